"""A layer's experts for a single row or a few, in Triton: two launches instead of some forty.

Grouped products sort the pairs of a token and an expert, and count those of each expert. Here each
program reads which expert is its own on the device. Sums are in fp32.

An expert that all tokens share is part of both launches, as is the sum with a residual.

Axes: T tokens, X experts of a token, E experts, W their width, S that of the shared one, K hidden
size, N rows of a program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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
def _gated(
    x_ptr, gate_ptr, up_ptr, n, stride,
    K: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply a token by rows `n` of the gate and of the other matrix, and gate the result."""
    k = tl.arange(0, BLOCK_K)
    at_NK = n.to(tl.int64)[:, None] * stride + k[None, :]
    gate_NK = tl.load(gate_ptr + at_NK, mask=(k < K)[None, :], other=0.0)
    up_NK = tl.load(up_ptr + at_NK, mask=(k < K)[None, :], other=0.0)
    triton_pdl.begin(EARLY)
    x_K = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    gate_sum_NK = gate_NK.to(tl.float32) * x_K[None, :]
    up_sum_NK = up_NK.to(tl.float32) * x_K[None, :]
    for start in tl.static_range(BLOCK_K, K, BLOCK_K):
        inside = start + k < K
        x_K = tl.load(x_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
        gate_NK = tl.load(gate_ptr + at_NK + start, mask=inside[None, :], other=0.0)
        up_NK = tl.load(up_ptr + at_NK + start, mask=inside[None, :], other=0.0)
        gate_sum_NK += gate_NK.to(tl.float32) * x_K[None, :]
        up_sum_NK += up_NK.to(tl.float32) * x_K[None, :]
    return activate(tl.sum(gate_sum_NK, 1), KIND) * tl.sum(up_sum_NK, 1)


@triton.jit
def _up(
    x_ptr, weight_ptr, index_ptr, gate_ptr, up_ptr, inner_ptr, X, shared_stride,
    W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute some of a token's hidden elements: of the shared expert, or of one of its own."""
    tile, token = tl.program_id(0), tl.program_id(1)
    x_ptr += token * K
    inner_ptr += token * (X * W + S)
    SHARED: tl.constexpr = (S + ROWS - 1) // ROWS
    TILES: tl.constexpr = (W + ROWS - 1) // ROWS
    # Rows beyond the last one are the last one again.
    if tile < SHARED:
        # While the kernels before choose experts, the first weights are read.
        n = tl.minimum(tile * ROWS + tl.arange(0, ROWS), S - 1)
        out_N = _gated(x_ptr, gate_ptr, up_ptr, n, shared_stride, K, BLOCK_K, KIND, PDL)
        tl.store(inner_ptr + X * W + n, out_N)
    else:
        triton_pdl.begin(PDL)
        x = (tile - SHARED) // TILES
        n = tl.minimum((tile - SHARED) % TILES * ROWS + tl.arange(0, ROWS), W - 1)
        expert = tl.load(index_ptr + token * X + x).to(tl.int64)
        weight_ptr += expert * 2 * W * K
        out_N = _gated(x_ptr, weight_ptr, weight_ptr + W * K, n, K, K, BLOCK_K, KIND, False)
        tl.store(inner_ptr + x * W + n, out_N)


@triton.jit
def _down(
    inner_ptr, weight_ptr, index_ptr, share_ptr, shared_ptr, add_ptr, out_ptr, shared_stride,
    X: tl.constexpr, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum some elements of a token's result over its experts."""
    token = tl.program_id(1)
    # Rows beyond the last one are the last one again.
    k = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), K - 1)
    index_ptr += token * X
    inner_ptr += token * (X * W + S)
    w = tl.arange(0, BLOCK_W)
    at_KW = k.to(tl.int64)[:, None] * W + w[None, :]
    # Experts were chosen before the kernel before began: only its own results are waited for, and
    # the first weights are read meanwhile.
    expert = tl.load(index_ptr).to(tl.int64)
    weight_KW = tl.load(weight_ptr + expert * K * W + at_KW, mask=(w < W)[None, :], other=0.0)
    triton_pdl.begin(PDL)
    sum_KW = tl.zeros((ROWS, BLOCK_W), tl.float32)
    for x in tl.static_range(X):
        of_expert_KW = tl.zeros((ROWS, BLOCK_W), tl.float32)
        if x > 0:
            expert = tl.load(index_ptr + x).to(tl.int64)
        for start in tl.static_range(0, W, BLOCK_W):
            inside = start + w < W
            if x + start > 0:
                weight_KW = tl.load(
                    weight_ptr + expert * K * W + at_KW + start, mask=inside[None, :], other=0.0
                )
            inner_W = tl.load(inner_ptr + x * W + start + w, mask=inside, other=0.0)
            of_expert_KW += weight_KW.to(tl.float32) * inner_W.to(tl.float32)[None, :]
        sum_KW += of_expert_KW * tl.load(share_ptr + token * X + x).to(tl.float32)
    at_KW = k.to(tl.int64)[:, None] * shared_stride + w[None, :]
    for start in tl.static_range(0, S, BLOCK_W):
        inside = start + w < S
        weight_KW = tl.load(shared_ptr + at_KW + start, mask=inside[None, :], other=0.0)
        inner_W = tl.load(inner_ptr + X * W + start + w, mask=inside, other=0.0)
        sum_KW += weight_KW.to(tl.float32) * inner_W.to(tl.float32)[None, :]
    out_K = tl.sum(sum_KW, 1)
    if ADD:
        out_K += tl.load(add_ptr + token * K + k).to(tl.float32)
    tl.store(out_ptr + token * K + k, out_K)


@torch.library.custom_op("star_attention::experts", mutates_args=())
def experts(
    x_TK: Tensor,
    gate_up_EVK: Tensor,
    down_EKW: Tensor,
    index_TX: Tensor,
    share_TX: Tensor,
    activation: str,
    shared: Sequence[Tensor],
    residual: Tensor | None,
) -> Tensor:
    """Sum the results of each token's experts, `[T, K]`.

    Args:
        x_TK: the tokens; each reads its experts' weights, so they are few.
        gate_up_EVK: weights of the gate's W rows, then of the W others: V = 2 W.
        down_EKW: weights of the second product.
        index_TX: each token's experts.
        share_TX: their shares of its result.
        activation: of the gate, one of `ACTIVATIONS`.
        shared: weights of an expert of all tokens, whose rows are contiguous: its gate's and the
            others, `[S, K]` both, and those of its second product, `[K, S]`; or none.
        residual: what is added to the result, T x K numbers, or None.
    """
    launch = functools.partial(_launch, x_TK, gate_up_EVK, down_EKW, index_TX, share_TX)
    return launch(activation, list(shared), residual)


def _launch(
    x_TK: Tensor,
    gate_up_EVK: Tensor,
    down_EKW: Tensor,
    index_TX: Tensor,
    share_TX: Tensor,
    activation: str,
    shared: list[Tensor],
    residual: Tensor | None,
    up: tuple[int, int, int] = (1, 2048, 4),
    down: tuple[int, int, int] = (2, 1024, 2),
) -> Tensor:
    """Do as `experts` does.

    Args:
        up: rows of both matrices that a program multiplies, bytes of each at once, and warps.
        down: the same of the second product. With more warps for a row, they exchange what they
            read of `inner` at every step.
    """
    (T, X), (_, K, W) = index_TX.shape, down_EKW.shape
    gate, other, second = shared or [gate_up_EVK] * 3
    S = gate.shape[0] if shared else 0
    inner, out = x_TK.new_empty(T, X * W + S), x_TK.new_empty(T, K)
    x_TK, index_TX, share_TX = x_TK.contiguous(), index_TX.contiguous(), share_TX.contiguous()
    early, size = triton_pdl.options(x_TK.device), gate_up_EVK.itemsize
    rows, nbytes, warps = up
    _up[(triton.cdiv(S, rows) + X * triton.cdiv(W, rows), T)](
        x_TK, gate_up_EVK, index_TX, gate, other, inner, X, gate.stride(0),
        W=W, S=S, K=K, ROWS=rows, BLOCK_K=min(nbytes // size, triton.next_power_of_2(K)),
        KIND=activation, num_warps=warps, **early,
    )  # fmt: skip
    rows, nbytes, warps = down
    _down[(triton.cdiv(K, rows), T)](
        inner, down_EKW, index_TX, share_TX, second,
        out if residual is None else residual.contiguous(), out, second.stride(0),
        X=X, W=W, S=S, K=K, ROWS=rows, BLOCK_W=min(nbytes // size, triton.next_power_of_2(W)),
        ADD=residual is not None, num_warps=warps, **early,
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
    shared: Sequence[Tensor],
    residual: Tensor | None,
) -> Tensor:
    return x_TK.new_empty(x_TK.shape)
