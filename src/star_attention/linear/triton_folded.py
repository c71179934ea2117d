"""A single row times matrices together with the work around them: one launch instead of several.

`folding` finds that work in the graph of a compiled layer: the gate's activation, and the sum with
the residual. Nothing in between is rounded. The operation is that of a few rows, too, which
`triton_few_folded` multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl
from star_attention.linear import triton_few_folded, triton_row
from star_attention.linear.triton_experts import activate
from star_attention.linear.triton_few import Product

_LEAST_ROWS = 4
"""Rows of both matrices that a program sums for a gated product, at least."""


@triton.jit
def _gated(
    x_ptr, K,
    w_ptr, up: tl.int64, stride, N, bias0_ptr, bias1_ptr, scale0_ptr, scale1_ptr, out_ptr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    STEPS: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr, SCALE: tl.constexpr,
    KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply by rows of the gate and of the other matrix, `up` elements later, in turn."""
    HALF: tl.constexpr = ROWS // 2
    row = tl.arange(0, ROWS)
    first = tl.program_id(0) * HALF
    out_N = triton_row.products(
        # Rows beyond the last one are the last one again.
        tl.minimum(first + row // 2, N - 1), row % 2 * up, stride,
        x_ptr, w_ptr, K, BLOCK_K, EVEN, AHEAD, STEPS, PDL,
    )  # fmt: skip
    gate_N, up_N = tl.split(tl.reshape(out_N, (HALF, 2)))
    n = tl.minimum(first + tl.arange(0, HALF), N - 1)
    if SCALE:
        gate_N *= tl.load(scale0_ptr + n)
        up_N *= tl.load(scale1_ptr + n)
    if BIAS0:
        gate_N += tl.load(bias0_ptr + n).to(tl.float32)
    if BIAS1:
        up_N += tl.load(bias1_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, activate(gate_N, KIND) * up_N)


@torch.library.custom_op("star_attention::folded_linears", mutates_args=())
def folded_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    parts: Sequence[int],
    scales: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`triton_row.linears` of rows, and what comes after them.

    Args:
        x: The rows, `[..., K]`.
        weights: As `linears` takes them, as are biases, parts and scales.
        biases: Of each matrix.
        parts: Of each matrix.
        scales: Of each matrix.
        residual: What is added to the result of a single matrix, or None for two.
        activation: One of `triton_experts.ACTIVATIONS`, of the first of two matrices of a shape,
            whose result the second one's is multiplied with; "" for a single matrix.

    Returns:
        The result, `[..., N]`: gated, or with the residual.
    """
    out = x.new_empty(*x.shape[:-1], parts[1])
    outs = [out] * len(weights)
    made = triton_row.made_products(x.shape[-1], weights, biases, parts, scales, outs)
    is_single = x.numel() == x.shape[-1]
    if residual is None:
        gated = _launch_gated if is_single else triton_few_folded.multiply_gated
        gated(x.contiguous(), made, activation)
    elif is_single:
        triton_row.launch(x.contiguous(), made, residual.contiguous())
    else:
        triton_few_folded.multiply_and_add(x, made[0], residual)
    return out


@folded_linears.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    parts: Sequence[int],
    scales: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], parts[1])


def _launch_gated(x: Tensor, products: list[Product], activation: str) -> None:
    gate, up = products
    weight, N = gate.weight, gate.weight.shape[0]
    tile = triton_row.tile_of(x, [weight, up.weight], least=_LEAST_ROWS, gated=True)
    biases = [weight if each.bias is None else each.bias for each in (gate, up)]
    scales = [weight if each.scale is None else each.scale for each in (gate, up)]
    _gated[(triton.cdiv(N, tile["ROWS"] // 2),)](
        x, x.shape[-1],
        weight, (up.weight.data_ptr() - weight.data_ptr()) // weight.itemsize,
        weight.stride(0), N, *biases, *scales, gate.out,
        BIAS0=gate.bias is not None, BIAS1=up.bias is not None, SCALE=gate.scale is not None,
        KIND=activation, **tile, **triton_pdl.options(x.device),
    )  # fmt: skip
