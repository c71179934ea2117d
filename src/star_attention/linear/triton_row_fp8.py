"""Rows of a matrix in fp8 (e4m3) times a single row in half precision: the loop of `triton_row`.

Four weights are read as an int32, and the four numbers that they are multiplied with as an int64.
The sums of a row and the threads that read it then stay apart until the end: a loop without
barriers, with few registers, so that many bytes are on the way.

Axes: N rows of a tile, Q groups of four columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl


class Tile(NamedTuple):
    """Rows and columns that a program reads at once, its warps, tiles on the way, and their number
    in a row at most where the program has no loop, else 0.

    Triton loads `x` in the order of the weights, instead of passing it through shared memory, if it
    has fewer elements, here int64, than there are threads.
    """

    rows: int
    columns: int
    warps: int
    ahead: int
    steps: int = 0


# By the rows of all matrices of a launch; of few, each program needs more bytes on the way.
_FEW, _MANY = 4096, 8192
_TILE_OF_FEW = Tile(16, 1024, 16, 2)
_TILE = Tile(8, 512, 8, 1)
_TILE_OF_MANY = Tile(16, 512, 8, 1)
# Of gate and up, of many rows: small programs, which end at about the same time.
_TILE_OF_GATED = Tile(4, 256, 4, 8, 32)
_ASM: tl.constexpr = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 ab, cd;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 ab, low;
    cvt.rn.f16x2.e4m3x2 cd, high;
    mov.b32 {a, b}, ab;
    mov.b32 {c, d}, cd;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@triton.jit
def _weight(word, AT: tl.constexpr):
    return ((word >> (8 * AT)) & 0xFF).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _weights(word, ASM: tl.constexpr):
    """Return the four weights of each int32, in fp32.

    `ASM` converts them in pairs, which needs compute capability 8.9; without it, Triton converts.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            _ASM, "=f,=f,=f,=f,r", [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _weight(word, 0), _weight(word, 1), _weight(word, 2), _weight(word, 3)


@triton.jit
def _number(word, AT: tl.constexpr, DTYPE: tl.constexpr):
    """Return the number in half precision at one of four places of each int64, in fp32."""
    half = (word >> (32 * (AT // 2))).to(tl.int32) >> (16 * (AT % 2))
    if DTYPE == tl.bfloat16:
        return (half << 16).to(tl.float32, bitcast=True)
    else:
        return half.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _added(sum_NQ, w_NQ, x_Q, DTYPE: tl.constexpr, ASM: tl.constexpr):
    a_NQ, b_NQ, c_NQ, d_NQ = _weights(w_NQ, ASM)
    sum_NQ += a_NQ * _number(x_Q, 0, DTYPE)[None, :]
    sum_NQ += b_NQ * _number(x_Q, 1, DTYPE)[None, :]
    sum_NQ += c_NQ * _number(x_Q, 2, DTYPE)[None, :]
    sum_NQ += d_NQ * _number(x_Q, 3, DTYPE)[None, :]
    return sum_NQ


@triton.jit
def sums(
    at_N, x_ptr, w_ptr, K,
    BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return the sums of rows, each `at_N` words of four weights after `w_ptr`.

    K is `STEPS` times `BLOCK_K`, or, if that is 0, a multiple; and at least `AHEAD` of them.
    """
    BLOCK_Q: tl.constexpr = BLOCK_K // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    q = tl.arange(0, BLOCK_Q)
    w_ptrs = w_ptr.to(tl.pointer_type(tl.int32)) + at_N[:, None] + q[None, :]
    x_ptrs = x_ptr.to(tl.pointer_type(tl.int64)) + q
    sum_NQ = tl.zeros((at_N.shape[0], BLOCK_Q), tl.float32)
    # PDL is on from compute capability 9.0, and off on a CPU: where it is on, the assembler can
    # convert. GPUs of 8.9 could, too; by Triton the numbers are the same, but gate and up of an 8B
    # model took an H200 32.1 us instead of 30.4.
    ASM: tl.constexpr = PDL
    # Weights do not depend on the kernel before: the first ones are read while it ends.
    if STEPS:
        # Each tile has registers of its own. A loop passes them on from turn to turn, and so waits
        # for what it has just begun to load.
        tiles = ()
        for i in tl.static_range(AHEAD):
            tiles += (tl.load(w_ptrs + i * BLOCK_Q),)  # type: ignore[assignment]
        triton_pdl.begin(PDL)
        for i in tl.static_range(STEPS):
            if i + AHEAD < STEPS:
                tiles += (tl.load(w_ptrs + (i + AHEAD) * BLOCK_Q),)  # type: ignore[assignment]
            sum_NQ = _added(sum_NQ, tiles[i], tl.load(x_ptrs + i * BLOCK_Q), DTYPE, ASM)
    else:
        w_NQ = tl.load(w_ptrs)
        if AHEAD == 2:
            after_NQ = tl.load(w_ptrs + BLOCK_Q)
        triton_pdl.begin(PDL)
        for start in range(AHEAD * BLOCK_Q, K // 4, BLOCK_Q):
            last_NQ = tl.load(w_ptrs + start)
            sum_NQ = _added(sum_NQ, w_NQ, tl.load(x_ptrs + start - AHEAD * BLOCK_Q), DTYPE, ASM)
            if AHEAD == 2:
                w_NQ = after_NQ
                after_NQ = last_NQ
            else:
                w_NQ = last_NQ
        x_ptrs += K // 4 - BLOCK_Q
        if AHEAD == 2:
            sum_NQ = _added(sum_NQ, w_NQ, tl.load(x_ptrs - BLOCK_Q), DTYPE, ASM)
            w_NQ = after_NQ
        sum_NQ = _added(sum_NQ, w_NQ, tl.load(x_ptrs), DTYPE, ASM)
    return tl.sum(sum_NQ, 1)


def tile(rows: int, K: int, *, gated: bool = False) -> Tile:
    """Return the tile for matrices that have so many rows of `K` numbers together.

    Args:
        gated: True for a launch that multiplies by rows of two matrices in turn.
    """
    if gated and rows > _MANY and K <= _TILE_OF_GATED.columns * _TILE_OF_GATED.steps:
        return _TILE_OF_GATED
    if rows <= _FEW:
        return _TILE_OF_FEW
    return _TILE if rows <= _MANY else _TILE_OF_MANY


def serves(x: Tensor, weights: list[Tensor], chosen: Tile) -> bool:
    """True for a row `x` and weights that `sums` reads, which have addresses of whole words."""
    K = x.shape[-1]
    return (
        x.element_size() == 2
        and K % chosen.columns == 0
        and K >= chosen.ahead * chosen.columns
        and x.data_ptr() % 8 == 0
        and all(
            weight.element_size() == 1 and weight.data_ptr() % 4 == weight.stride(0) % 4 == 0
            for weight in weights
        )
    )
