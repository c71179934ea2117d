"""A few rows times matrices together with the work around them, as `triton_folded` for one row.

A gated product without splits is one launch: each program has rows of both matrices. The sum of
splits does what follows otherwise: it gates, or normalizes whole rows.

Axes: those of `triton_few`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl
from star_attention.linear import triton_few, triton_norm, triton_row
from star_attention.linear.triton_experts import ACTIVATIONS, activate
from star_attention.linear.triton_few import Product
from star_attention.linear.triton_norm import RowNorms

_SUM_BLOCK = 512
"""Numbers of a gated result that a program sums."""


@triton.jit
def _gated(
    x_ptr, M, K, x_stride, w_ptr, up: tl.int64, stride, N,
    bias0_ptr, bias1_ptr, scale0_ptr, scale1_ptr, out_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply by rows of the gate and of the other matrix, `up` elements later.

    They take turns of 8 rows: where tensor cores leave results, a thread has both of a pair.
    """
    EIGHTS: tl.constexpr = BLOCK_N // 16
    start = tl.program_id(0) * (BLOCK_N // 2)
    # Rows beyond the last one are the last one again.
    row = tl.arange(0, BLOCK_N)
    at_N = tl.minimum(start + row // 16 * 8 + row % 8, N - 1).to(tl.int64) * stride
    w_ptrs = w_ptr + at_N + row // 8 % 2 * up
    triton_pdl.begin(PDL)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc_NM = triton_few.dots(
        w_ptrs[:, None], x_ptr, x_stride, m, M, 0, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, SCALE
    )
    acc_NM = tl.permute(tl.reshape(acc_NM, (EIGHTS, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    gate_NM, up_NM = tl.split(acc_NM)
    gate_NM = tl.reshape(gate_NM, (EIGHTS * 8, BLOCK_M))
    up_NM = tl.reshape(up_NM, (EIGHTS * 8, BLOCK_M))
    n = start + tl.arange(0, EIGHTS * 8)
    if SCALE:
        gate_NM *= tl.load(scale0_ptr + n, mask=n < N, other=0.0)[:, None]
        up_NM *= tl.load(scale1_ptr + n, mask=n < N, other=0.0)[:, None]
    if BIAS:
        gate_NM += tl.load(bias0_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        up_NM += tl.load(bias1_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n[:, None] < N) & (m[None, :] < M)
    place = out_ptr + m[None, :] * N + n[:, None]
    tl.store(place, activate(gate_NM, KIND) * up_NM, mask=inside)


@triton.jit
def _sum_gated(
    parts_ptr, M, N, bias0_ptr, bias1_ptr, scale0_ptr, scale1_ptr, out_ptr,
    S: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, n = at < M * N, at % N
    # A row has the sums of both matrices.
    parts_ptrs = parts_ptr + at // N * (2 * N) + n
    triton_pdl.begin(PDL)
    gate = tl.zeros([BLOCK], dtype=tl.float32)
    up = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(S):
        gate += tl.load(parts_ptrs + split * (2 * M * N), mask=mask, other=0.0)
        up += tl.load(parts_ptrs + split * (2 * M * N) + N, mask=mask, other=0.0)
    if SCALE:
        gate *= tl.load(scale0_ptr + n, mask=mask, other=0.0)
        up *= tl.load(scale1_ptr + n, mask=mask, other=0.0)
    if BIAS:
        gate += tl.load(bias0_ptr + n, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(bias1_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, activate(gate, KIND) * up, mask=mask)


@triton.jit
def _sum_norms(
    parts_ptr, bias_ptr, scale_ptr, M,
    add_ptr, post_ptr, pre_ptr, sum_ptr, out_ptr, N, times, post_eps, pre_eps, words,
    S: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    POST: tl.constexpr, ADD: tl.constexpr, PRE: tl.constexpr,
    POST_OFFSET: tl.constexpr, PRE_OFFSET: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sum the splits of a row, and do what follows it (`triton_norm`)."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    mask, place = at < words, row * words + at
    n = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    # Weights do not depend on the kernel before.
    post = tl.load(post_ptr + at, mask=mask, other=0) if POST else at
    pre = tl.load(pre_ptr + at, mask=mask, other=0) if PRE else at
    triton_pdl.begin(PDL)
    added = tl.load(add_ptr + place, mask=mask, other=0) if ADD else at
    total = tl.zeros([BLOCK, 2], dtype=tl.float32)
    for split in tl.static_range(S):
        total += tl.load(parts_ptr + (split * M + row) * N + n, mask=n < N, other=0.0)
    if SCALE:
        total *= tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    first, second = tl.split(total)
    triton_norm.finish(
        first, second, added, post, pre, sum_ptr, out_ptr, place, mask, N,
        times, post_eps, pre_eps, POST, ADD, PRE, POST_OFFSET, PRE_OFFSET, DTYPE,
    )  # fmt: skip


def multiply_gated(x: Tensor, products: list[Product], activation: str) -> None:
    """Multiply the second product with the activation of the first one.

    Args:
        x: a few rows, `[..., K]`, or many, which torch multiplies.
        products: with matrices of one shape and precision, whose rows have one stride. The result
            is written where the first one's belongs.
        activation: one of `ACTIVATIONS`.
    """
    gate, up = products
    weight, N = gate.weight, len(gate.weight)
    if not triton_few.serves(x, products):
        rows = [triton_row.by_torch(x, each) for each in products]
        torch.mul(ACTIVATIONS[activation](rows[0]), rows[1], out=gate.out)
        return
    tiles = triton_few.tiles_of(x, products)
    biases = [weight if each.bias is None else each.bias for each in products]
    scales = [weight if each.scale is None else each.scale for each in products]
    M, (_, tiles_M, splits) = len(tiles.x_MK), tiles.grid
    has_bias = gate.bias is not None
    if splits == 1:
        _gated[(triton.cdiv(N, tiles.constants["BLOCK_N"] // 2), tiles_M)](
            tiles.x_MK, *tiles.x_MK.shape, tiles.x_MK.stride(0),
            weight, (up.weight.data_ptr() - weight.data_ptr()) // weight.itemsize,
            weight.stride(0), N, *biases, *scales, gate.out,
            BIAS=has_bias, KIND=activation, **tiles.constants,
        )  # fmt: skip
        return
    parts = triton_few.sums(tiles, products)
    _sum_gated[(triton.cdiv(M * N, _SUM_BLOCK),)](
        parts, M, N, *biases, *scales, gate.out,
        S=splits, BLOCK=_SUM_BLOCK, BIAS=has_bias, SCALE=gate.scale is not None,
        KIND=activation, num_warps=4, **triton_pdl.options(x.device),
    )  # fmt: skip


def multiply_and_add(x: Tensor, product: Product, residual: Tensor) -> None:
    """Add a residual, of the result's shape, to the product of a few rows or many."""
    if triton_few.serves(x, [product]):
        triton_few.launch(x, [product], residual.contiguous())
    else:
        torch.add(triton_row.by_torch(x, product), residual, out=product.out)


@torch.library.custom_op("star_attention::normed_linear", mutates_args=())
def normed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Sequence[int],
    scale: Tensor | None,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    """`triton_row.linears` of a matrix, and what follows each row of its result.

    Args:
        x: The rows, `[..., K]`.
        weight: As `linears` takes it, as are bias, part and scale.
        bias: Of the matrix.
        parts: Of the matrix.
        scale: Of the matrix.
        post: Of `RowNorms`, as are the other arguments.
        times: Of `RowNorms`.
        residual: Of `RowNorms`.
        pre: Of `RowNorms`.
        offsets: Of `RowNorms`.
        eps: Of `RowNorms`.

    Returns:
        The results of `RowNorms`.
    """
    norms = RowNorms(post, times, residual, pre, offsets, eps)
    out = x.new_empty(*x.shape[:-1], parts[1])
    (product,) = triton_row.made_products(x.shape[-1], [weight], [bias], parts, [scale], [out])
    if x.numel() > x.shape[-1] and triton_few.serves(x, [product]):
        tiles = triton_few.tiles_of(x, [product])
        if tiles.grid[2] > 1:
            return _normed_sums(tiles, product, norms)
    triton_row.multiply(x, [product])
    return norms.after(out)


@normed_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Sequence[int],
    scale: Tensor | None,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    out = x.new_empty(*x.shape[:-1], parts[1])
    return RowNorms(post, times, residual, pre, offsets, eps).outs(out)


def _normed_sums(tiles: triton_few.Tiles, product: Product, norms: RowNorms) -> list[Tensor]:
    """Return what follows the sums of a product's splits."""
    weight, bias, scale, row = product
    parts, M = triton_few.sums(tiles, [product]), len(tiles.x_MK)
    outs, (words, sizes) = norms.outs(row), triton_norm.words_of(row)
    arguments, constants = norms.arguments(row, outs)
    _sum_norms[(M,)](
        parts, weight if bias is None else bias, weight if scale is None else scale,
        M, *arguments, words,
        S=tiles.grid[2], BIAS=bias is not None, SCALE=scale is not None, **sizes, **constants,
        **triton_pdl.options(row.device),
    )  # fmt: skip
    return outs
