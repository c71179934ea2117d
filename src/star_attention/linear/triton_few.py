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
"""Programs for each multiprocessor that the splits aim at."""
_SUM_BLOCK = 1024


@triton.jit
def _products(
    x_ptr, parts_ptr, M, K, x_stride, split_K,
    w0_ptr, bias0_ptr, scale0_ptr, out0_ptr, N0, stride0,
    w1_ptr, bias1_ptr, scale1_ptr, out1_ptr, N1, stride1,
    w2_ptr, bias2_ptr, scale2_ptr, out2_ptr, N2, stride2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
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
    x_ptrs = x_ptr + m[None, :] * x_stride
    acc_NM = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    triton_pdl.begin(PDL)
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
    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLIT:
        # Every split has a sum of each row and column of all matrices.
        columns = N0 + N1 + N2
        place = (split * M + m[None, :]) * columns + first_column + n[:, None]
        tl.store(parts_ptr + place, acc_NM, mask=inside)
    else:
        if SCALE:
            acc_NM *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if BIAS:
            acc_NM += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + m[None, :] * N + n[:, None], acc_NM, mask=inside)


@triton.jit
def _store(
    total, at, first_column, columns, bias_ptr, scale_ptr, out_ptr, N, SIZE,
    BIAS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Store those of the sums that belong to one matrix."""
    n = at % columns - first_column
    mask = (at < SIZE) & (n >= 0) & (n < N)
    if SCALE:
        total *= tl.load(scale_ptr + n, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at // columns * N + n, total, mask=mask)


@triton.jit
def _sum(
    parts_ptr, M,
    bias0_ptr, scale0_ptr, out0_ptr, N0,
    bias1_ptr, scale1_ptr, out1_ptr, N1,
    bias2_ptr, scale2_ptr, out2_ptr, N2,
    S: tl.constexpr, BLOCK: tl.constexpr, MATRICES: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = N0 + N1 + N2
    SIZE = M * columns
    triton_pdl.begin(PDL)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(S):
        total += tl.load(parts_ptr + split * SIZE + at, mask=at < SIZE, other=0.0)
    _store(total, at, 0, columns, bias0_ptr, scale0_ptr, out0_ptr, N0, SIZE, BIAS, SCALE)
    if MATRICES > 1:
        _store(total, at, N0, columns, bias1_ptr, scale1_ptr, out1_ptr, N1, SIZE, BIAS, SCALE)
    if MATRICES > 2:
        _store(total, at, N0 + N1, columns, bias2_ptr, scale2_ptr, out2_ptr, N2, SIZE, BIAS, SCALE)


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


def launch(x: Tensor, products: list[Product]) -> None:
    """Multiply rows `[..., K]` in half precision with up to three matrices, with sums in fp32."""
    K = x.shape[-1]
    x_MK = x.reshape(-1, K)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    M, (_, bias, scale, _) = len(x_MK), products[0]
    sizes = [each.weight.shape[0] for each in products]
    block_M = min(64, max(16, triton.next_power_of_2(M)))
    tiles = sum(triton.cdiv(size, _BLOCK_N) for size in sizes), triton.cdiv(M, block_M)
    splits, split_K = _splits(tiles[0] * tiles[1], K, x.device)
    parts = x.new_empty(splits, M, sum(sizes), dtype=torch.float32) if splits > 1 else x_MK
    # Missing matrices are the first one again, which no program reaches: their size is 0.
    missing = MAX_MATRICES - len(products)
    matrices: list[Any] = []
    results: list[Any] = []
    for each, size in zip(products + products[:1] * missing, sizes + [0] * missing, strict=True):
        # Pointers that no kernel reads need a type all the same.
        result = x if bias is None else each.bias, x if scale is None else each.scale, each.out
        results += *result, size
        matrices += each.weight, *result, size, each.weight.stride(0)
    flags = dict(BIAS=bias is not None, SCALE=scale is not None, **triton_pdl.options(x.device))
    _products[(*tiles, splits)](
        x_MK, parts, M, K, x_MK.stride(0), split_K, *matrices,
        BLOCK_M=block_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        EVEN=K % split_K == 0 and split_K % _BLOCK_K == 0,
        SPLIT=splits > 1, num_warps=4, num_stages=_STAGES, **flags,
    )  # fmt: skip
    if splits > 1:
        _sum[(triton.cdiv(M * sum(sizes), _SUM_BLOCK),)](
            parts, M, *results,
            S=splits, BLOCK=_SUM_BLOCK, MATRICES=len(products), num_warps=4, **flags,
        )  # fmt: skip


def _splits(tiles: int, K: int, device: torch.device) -> tuple[int, int]:
    """Return the number of splits along K, and the columns of each."""
    wanted = triton.cdiv(_PROGRAMS * _processors(device), tiles)
    splits = max(1, min(wanted, K // _LEAST_K))
    split_K = triton.cdiv(triton.cdiv(K, splits), _BLOCK_K) * _BLOCK_K
    return triton.cdiv(K, split_K), split_K


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
