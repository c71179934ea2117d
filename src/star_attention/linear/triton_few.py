"""Up to three matrices times a few rows, in Triton: in fp8, or in the rows' precision.

Reading the weights bounds it. Matrices with few rows are also split along K, so that enough
programs read at once; their sums are added in a fixed order by a second kernel. Weights in fp8
become the rows' precision in registers.

Axes: M rows of the input, N rows of a matrix, K columns, S splits of K.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl

MAX_MATRICES = 3
"""Matrices of one launch, at most."""

MOST = {1: 256, 2: 64}
"""Rows up to which the kernels are used, by the bytes of a weight. With more, the arithmetic
counts, and torch multiplies: weights in fp8 are written as bf16 before."""

_BLOCK_N, _BLOCK_K = 64, 128
_STAGES = 4
"""Blocks of columns that are on the way, or multiplied, at a time."""
_LEAST_K = 512
"""Columns of a split, at least."""
_PROGRAMS = 2
"""Programs for each multiprocessor that the splits aim at, at most."""
_SUM_BLOCK = 1024


@triton.jit
def dots(
    w_ptrs, x_ptr, x_stride, m, M, first, stop,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """Return the products of rows of a matrix, at `w_ptrs`, with rows `m` of `x`: `[N, M]`."""
    x_ptrs = x_ptr + m[None, :] * x_stride
    acc_NM = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(first, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            w_NK = tl.load(w_ptrs + k[None, :])
            x_KM = tl.load(x_ptrs + k[:, None], mask=(m < M)[None, :], other=0.0)
        else:
            w_NK = tl.load(w_ptrs + k[None, :], mask=(k < stop)[None, :], other=0.0)
            inside = (m < M)[None, :] & (k < stop)[:, None]
            x_KM = tl.load(x_ptrs + k[:, None], mask=inside, other=0.0)
        # The matrix is the first operand, which tensor cores take from registers, too.
        if SCALE:
            w_NK = w_NK.to(tl.float32).to(x_KM.dtype)
        acc_NM = tl.dot(w_NK, x_KM, acc_NM)
    return acc_NM


@triton.jit
def _products(
    x_ptr, parts_ptr, add_ptr, M, K, x_stride, split_K,
    w0_ptr, bias0_ptr, scale0_ptr, out0_ptr, N0, stride0,
    w1_ptr, bias1_ptr, scale1_ptr, out1_ptr, N1, stride1,
    w2_ptr, bias2_ptr, scale2_ptr, out2_ptr, N2, stride2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(2)
    w_ptr, bias_ptr, scale_ptr, out_ptr = w0_ptr, bias0_ptr, scale0_ptr, out0_ptr
    N, stride, first_column = N0, stride0, 0
    tiles0, tiles1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    if tile >= tiles0 + tiles1:
        tile -= tiles0 + tiles1
        w_ptr, bias_ptr, scale_ptr, out_ptr = w2_ptr, bias2_ptr, scale2_ptr, out2_ptr
        N, stride, first_column = N2, stride2, N0 + N1
    elif tile >= tiles0:
        tile -= tiles0
        w_ptr, bias_ptr, scale_ptr, out_ptr = w1_ptr, bias1_ptr, scale1_ptr, out1_ptr
        N, stride, first_column = N1, stride1, N0
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, stop = split * split_K, tl.minimum((split + 1) * split_K, K)
    # Rows beyond the last one are the last one again.
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride
    triton_pdl.begin(PDL)
    acc_NM = dots(
        w_ptrs, x_ptr, x_stride, m, M, first, stop, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, SCALE
    )
    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLIT:
        # Every split has a sum of each row and column of all matrices.
        columns = N0 + N1 + N2
        place = (split * M + m[None, :]) * columns + first_column + n[:, None]
        tl.store(parts_ptr + place, acc_NM, mask=inside)
    else:
        place = m[None, :] * N + n[:, None]
        if SCALE:
            acc_NM *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if BIAS:
            acc_NM += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if ADD:
            acc_NM += tl.load(add_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, acc_NM, mask=inside)


@triton.jit
def _store(
    total, at, first_column, columns, bias_ptr, scale_ptr, out_ptr, N, SIZE, add_ptr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Store those of the sums that belong to one matrix."""
    n = at % columns - first_column
    mask = (at < SIZE) & (n >= 0) & (n < N)
    if SCALE:
        total *= tl.load(scale_ptr + n, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    place = at // columns * N + n
    if ADD:
        total += tl.load(add_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total, mask=mask)


@triton.jit
def _sum(
    parts_ptr, add_ptr, M,
    bias0_ptr, scale0_ptr, out0_ptr, N0,
    bias1_ptr, scale1_ptr, out1_ptr, N1,
    bias2_ptr, scale2_ptr, out2_ptr, N2,
    S: tl.constexpr, BLOCK: tl.constexpr, MATRICES: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = N0 + N1 + N2
    SIZE = M * columns
    triton_pdl.begin(PDL)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(S):
        total += tl.load(parts_ptr + split * SIZE + at, mask=at < SIZE, other=0.0)
    _store(
        total, at, 0, columns, bias0_ptr, scale0_ptr, out0_ptr, N0, SIZE,
        add_ptr, BIAS, SCALE, ADD,
    )  # fmt: skip
    if MATRICES > 1:
        _store(
            total, at, N0, columns, bias1_ptr, scale1_ptr, out1_ptr, N1, SIZE,
            add_ptr, BIAS, SCALE, False,
        )  # fmt: skip
    if MATRICES > 2:
        _store(
            total, at, N0 + N1, columns, bias2_ptr, scale2_ptr, out2_ptr, N2, SIZE,
            add_ptr, BIAS, SCALE, False,
        )  # fmt: skip


class Product(NamedTuple):
    """A matrix that rows `[..., K]` are multiplied with.

    Attributes:
        weight: `[N, K]`, whose rows are contiguous.
        bias: `[N]`, or None.
        scale: the scale of each of its rows, fp32, or None for a weight in the rows' precision.
        out: where the result goes, `[..., N]`, contiguous.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    out: Tensor


def serves(x: Tensor, products: list[Product]) -> bool:
    """Return True if the kernels multiply these rows with these matrices in one launch."""
    weight, bias, scale, _ = products[0]
    return (
        x.element_size() == 2
        and x.shape[:-1].numel() <= MOST.get(weight.element_size(), 0)
        and (scale is not None or weight.dtype == x.dtype)
        and all(
            each.weight.dtype == weight.dtype
            and (each.bias is None) == (bias is None)
            and (each.scale is None) == (scale is None)
            for each in products
        )
    )


class Tiles(NamedTuple):
    """How products of rows are divided among programs.

    Attributes:
        x_MK: the rows; columns are next to one another.
        grid: tiles of the matrices' rows, of the rows, and splits.
        split_K: columns of each split.
        constants: what kernels are compiled for.
    """

    x_MK: Tensor
    grid: tuple[int, int, int]
    split_K: int
    constants: dict[str, Any]


def tiles_of(x: Tensor, products: list[Product]) -> Tiles:
    """Divide the products of rows `[..., K]`."""
    K, weights = x.shape[-1], [each.weight for each in products]
    x_MK = x.reshape(-1, K)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    block_M = min(64, max(16, triton.next_power_of_2(len(x_MK))))
    tiles = sum(triton.cdiv(len(each), _BLOCK_N) for each in weights)
    tiles_M = triton.cdiv(len(x_MK), block_M)
    splits, split_K = _splits(tiles * tiles_M, K, x.device)
    constants = dict(
        BLOCK_M=block_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        EVEN=K % split_K == 0 and split_K % _BLOCK_K == 0,
        SCALE=products[0].scale is not None, num_warps=4, num_stages=_STAGES,
        **triton_pdl.options(x.device),
    )  # fmt: skip
    return Tiles(x_MK, (tiles, tiles_M, splits), split_K, constants)


def launch(x: Tensor, products: list[Product], residual: Tensor | None = None) -> None:
    """Multiply rows `[..., K]` in half precision with up to three matrices, with sums in fp32.

    Args:
        x: the rows.
        products: what they are multiplied with.
        residual: what is added to the result of a single matrix, contiguous, or None.
    """
    tiles, bias = tiles_of(x, products), products[0].bias
    added = x if residual is None else residual
    if tiles.grid[2] == 1:
        _launch(tiles, products, tiles.x_MK, added, BIAS=bias is not None, ADD=residual is not None)
        return
    parts = sums(tiles, products)
    S, M, N = parts.shape
    _sum[(triton.cdiv(M * N, _SUM_BLOCK),)](
        parts, added, M, *(each for of_one in _results(products) for each in of_one),
        S=S, BLOCK=_SUM_BLOCK, MATRICES=len(products), num_warps=4,
        BIAS=bias is not None, SCALE=products[0].scale is not None, ADD=residual is not None,
        **triton_pdl.options(x.device),
    )  # fmt: skip


def sums(tiles: Tiles, products: list[Product]) -> Tensor:
    """Return the sums of several splits, `[S, M, N]` with columns of all matrices."""
    N = sum(len(each.weight) for each in products)
    parts = tiles.x_MK.new_empty(tiles.grid[2], len(tiles.x_MK), N, dtype=torch.float32)
    _launch(tiles, products, parts, tiles.x_MK, BIAS=False, ADD=False)
    return parts


def _launch(
    tiles: Tiles, products: list[Product], parts: Tensor, added: Tensor, **flags: bool
) -> None:
    x_MK = tiles.x_MK
    matrices = [
        (each.weight, *result, each.weight.stride(0))
        for each, result in zip(_filled(products), _results(products), strict=True)
    ]
    _products[tiles.grid](
        x_MK, parts, added, *x_MK.shape, x_MK.stride(0), tiles.split_K,
        *(each for of_one in matrices for each in of_one),
        SPLIT=tiles.grid[2] > 1, **flags, **tiles.constants,
    )  # fmt: skip


def _filled(products: list[Product]) -> list[Product]:
    """Return as many products as kernels take: missing ones are the first one again."""
    return products + products[:1] * (MAX_MATRICES - len(products))


def _results(products: list[Product]) -> list[tuple[Any, ...]]:
    """Return what kernels take for each result: bias, scale, place, and size.

    No program reaches missing products: their size is 0. Pointers that no kernel reads need a type
    all the same.
    """
    return [
        (
            weight if bias is None else bias,
            weight if scale is None else scale,
            out,
            len(weight) if at < len(products) else 0,
        )
        for at, (weight, bias, scale, out) in enumerate(_filled(products))
    ]


def _splits(tiles: int, K: int, device: torch.device) -> tuple[int, int]:
    """Return the number of splits along K, and the columns of each.

    All programs should run at once: those of a second wave would read alone.
    """
    wanted = _PROGRAMS * _processors(device) // tiles
    splits = max(1, min(wanted, K // _LEAST_K))
    split_K = triton.cdiv(triton.cdiv(K, splits), _BLOCK_K) * _BLOCK_K
    return triton.cdiv(K, split_K), split_K


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
