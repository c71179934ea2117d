"""Matrices in fp8 times a few rows, in Triton: weights become bf16 in registers.

Reading the weights bounds it. Matrices with few rows are also split along K, so that enough
programs read at once; their sums are added in a fixed order by a second kernel.

Axes: M rows of the input, N rows of the matrix, K columns, S splits of K.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from star_attention.attention.kernels import triton_pdl, triton_row

MOST = 256
"""Rows up to which these kernels are used. With more, the arithmetic counts, and torch multiplies
weights that are written as bf16 before."""

_BLOCK_N, _BLOCK_K = 64, 128
_LEAST_K = 512
"""Columns of a split, at least."""
_PROGRAMS = 2
"""Programs for each multiprocessor that the splits aim at."""
_SUM_BLOCK = 1024


@triton.jit
def _product(
    x_ptr, w_ptr, scale_ptr, out_ptr, M, N, K, x_stride, w_stride, split_K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first, stop = split * split_K, tl.minimum((split + 1) * split_K, K)
    w_ptrs = w_ptr + n[:, None] * w_stride
    x_ptrs = x_ptr + m[None, :] * x_stride
    acc_NM = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    triton_pdl.begin(PDL)
    for start in range(first, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w_NK = tl.load(w_ptrs + k[None, :], mask=(n[:, None] < N) & (k[None, :] < stop), other=0.0)
        x_KM = tl.load(x_ptrs + k[:, None], mask=(m[None, :] < M) & (k[:, None] < stop), other=0.0)
        # The matrix is the first operand, which tensor cores take from registers.
        acc_NM = tl.dot(w_NK.to(tl.float32).to(x_KM.dtype), x_KM, acc_NM)
    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLIT:
        out_ptr += split.to(tl.int64) * M * N
    else:
        acc_NM *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    tl.store(out_ptr + m[None, :] * N + n[:, None], acc_NM, mask=inside)


@triton.jit
def _sum(
    parts_ptr, scale_ptr, out_ptr, SIZE, N,
    S: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + at % N, mask=at < SIZE, other=0.0)
    triton_pdl.begin(PDL)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(S):
        total += tl.load(parts_ptr + split * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(out_ptr + at, total * scale, mask=at < SIZE)


@torch.library.custom_op("star_attention::fp8_rows", mutates_args=())
def rows(x: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Multiply a few rows `[..., K]` with a matrix in fp8, to `[..., N]`, with sums in fp32.

    Args:
        x: The rows, in bf16 or fp16.
        weight_NK: The matrix, or a part of it whose rows are contiguous.
        scale_N: The scale of each of its rows, fp32.
    """
    N, K = weight_NK.shape
    x_MK = x.reshape(-1, K)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    M = len(x_MK)
    if M > MOST:
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        out = functional.linear(x.to(dtype), weight_NK.to(dtype))
        return (out.float() * scale_N).to(x.dtype)
    block_M = min(64, max(16, triton.next_power_of_2(M)))
    tiles = triton.cdiv(N, _BLOCK_N), triton.cdiv(M, block_M)
    splits, split_K = _splits(tiles[0] * tiles[1], K, x.device)
    out = x.new_empty(*x.shape[:-1], N)
    parts = out if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    options = triton_pdl.options(x.device)
    _product[(*tiles, splits)](
        x_MK, weight_NK, scale_N, parts, M, N, K, x_MK.stride(0), weight_NK.stride(0), split_K,
        BLOCK_M=block_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, SPLIT=splits > 1,
        num_warps=4, num_stages=4, **options,
    )  # fmt: skip
    if splits > 1:
        _sum[(triton.cdiv(M * N, _SUM_BLOCK),)](
            parts, scale_N, out, M * N, N, S=splits, BLOCK=_SUM_BLOCK, num_warps=4, **options
        )
    return out


@rows.register_fake
def _(x: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_NK.shape[0])


def linear(x: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Multiply one row or a few by the kernel for them."""
    if x.numel() == x.shape[-1]:
        return triton_row.linear(x, weight_NK, None, scale=scale_N)
    out: Tensor = rows(x, weight_NK, scale_N)
    return out


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
