"""A layer's experts for a single row or a few, in Triton: two launches instead of some forty.

Grouped products sort the pairs of a token and an expert, and count those of each expert. Here each
program reads which expert is its own on the device. Sums are in fp32.

Axes: T tokens, X experts of a token, E experts, W their width, K hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from star_attention.attention.kernels import triton_pdl

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
"""Activations of the gate that the kernels know."""


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)


@triton.jit
def _up(
    x_ptr, weight_ptr, index_ptr, out_ptr, X,
    W: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply a token by one row of the gate and one of the other half, and gate the result."""
    # The layer has chosen its experts in the kernels before.
    triton_pdl.begin(PDL)
    w = tl.program_id(0)
    pair = tl.program_id(1)
    expert = tl.load(index_ptr + pair).to(tl.int64)
    gate_ptr = weight_ptr + (expert * 2 * W + w) * K
    x_ptr += pair // X * K
    gate_K = tl.zeros((BLOCK_K,), tl.float32)
    up_K = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_K = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        gate_K += x_K * tl.load(gate_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        up_K += x_K * tl.load(gate_ptr + W * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + pair * W + w, activate(tl.sum(gate_K, 0), KIND) * tl.sum(up_K, 0))


@triton.jit
def _down(
    inner_ptr, weight_ptr, index_ptr, share_ptr, out_ptr,
    X: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum one element of a token's result over its experts."""
    k = tl.program_id(0)
    token = tl.program_id(1)
    x = tl.arange(0, BLOCK_X)
    pair_X = token * X + x
    # Experts were chosen before the kernel before began: only its own results are waited for, and
    # the first weights are read meanwhile.
    expert_X = tl.load(index_ptr + pair_X, mask=x < X, other=0).to(tl.int64)
    row_X1 = (weight_ptr + (expert_X * K + k) * W)[:, None]
    w = tl.arange(0, BLOCK_W)
    mask_XW = (x < X)[:, None] & (w < W)[None, :]
    weight_XW = tl.load(row_X1 + w[None, :], mask=mask_XW, other=0.0)
    triton_pdl.begin(PDL)
    share_X1 = tl.load(share_ptr + pair_X, mask=x < X, other=0.0).to(tl.float32)[:, None]
    inner_X1 = (inner_ptr + pair_X * W)[:, None]
    inner_XW = tl.load(inner_X1 + w[None, :], mask=mask_XW, other=0.0)
    sum_XW = weight_XW.to(tl.float32) * inner_XW.to(tl.float32)
    for start in tl.static_range(BLOCK_W, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        mask_XW = (x < X)[:, None] & (w < W)[None, :]
        weight_XW = tl.load(row_X1 + w[None, :], mask=mask_XW, other=0.0).to(tl.float32)
        sum_XW += weight_XW * tl.load(inner_X1 + w[None, :], mask=mask_XW, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * K + k, tl.sum(tl.sum(sum_XW * share_X1, 1), 0))


@torch.library.custom_op("star_attention::experts", mutates_args=())
def experts(
    x_TK: Tensor,
    gate_up_EVK: Tensor,
    down_EKW: Tensor,
    index_TX: Tensor,
    share_TX: Tensor,
    activation: str,
) -> Tensor:
    """Sum the results of each token's experts, `[T, K]`.

    Args:
        x_TK: the tokens; each reads its experts' weights, so they are few.
        gate_up_EVK: weights of the gate's W rows, then of the W others: V = 2 W.
        down_EKW: weights of the second product.
        index_TX: each token's experts.
        share_TX: their shares of its result.
        activation: of the gate, one of `ACTIVATIONS`.
    """
    (T, X), (_, K, W) = index_TX.shape, down_EKW.shape
    inner, out = x_TK.new_empty(T * X, W), x_TK.new_empty(T, K)
    x_TK, index_TX, share_TX = x_TK.contiguous(), index_TX.contiguous(), share_TX.contiguous()
    early, columns = triton_pdl.options(x_TK.device), 2048 // gate_up_EVK.itemsize
    _up[(W, T * X)](
        x_TK, gate_up_EVK, index_TX, inner, X,
        W=W, K=K, BLOCK_K=min(columns, triton.next_power_of_2(K)), KIND=activation,
        num_warps=4, **early,
    )  # fmt: skip
    _down[(K, T)](
        inner, down_EKW, index_TX, share_TX, out,
        X=X, W=W, K=K, BLOCK_X=triton.next_power_of_2(X),
        BLOCK_W=min(columns // 2, triton.next_power_of_2(W)), num_warps=4, **early,
    )  # fmt: skip
    return out


@experts.register_fake
def _(
    x_TK: Tensor,
    gate_up_EVK: Tensor,
    down_EKW: Tensor,
    index_TX: Tensor,
    share_TX: Tensor,
    activation: str,
) -> Tensor:
    return x_TK.new_empty(x_TK.shape)
