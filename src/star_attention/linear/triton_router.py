"""A single token's choice of experts, in Triton: its scores, and the largest of them.

torch sums the scores in two launches and finds the largest in a third, which searches them bit by
bit for as long as several of a layer's products take. Here each score counts how many are larger.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl
from star_attention.linear import triton_row
from star_attention.linear.triton_few import Product

MOST_SCORES = 1024
"""Scores of a token, at most."""
KINDS = {
    "": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
}
"""What the kernel computes of scores before it chooses."""
_COMPARED: tl.constexpr = tl.constexpr(64)
"""Scores that a score is compared with at once."""


@triton.jit
def _order(x):
    """Return integers in the order of numbers; NaN comes last, as torch has it."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _largest(
    x_ptr, value_ptr, index_ptr, N, K,
    BLOCK: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    triton_pdl.begin(PDL)
    n = tl.arange(0, BLOCK)
    x_N = tl.load(x_ptr + n, mask=n < N, other=float("-inf")).to(tl.float32)
    order_N = _order(x_N)
    # Of equal numbers the first one counts as larger: all places differ.
    place_N = tl.zeros((BLOCK,), tl.int32)
    for start in tl.static_range(0, BLOCK, _COMPARED):
        m = start + tl.arange(0, _COMPARED)
        order_M = _order(tl.load(x_ptr + m, mask=m < N, other=float("-inf")))
        before = (m[None, :] < n[:, None]) & (order_M[None, :] == order_N[:, None])
        is_before = (before | (order_M[None, :] > order_N[:, None])) & (m < N)[None, :]
        place_N += tl.sum(is_before.to(tl.int32), 1)
    if KIND == "softmax":
        x_N = tl.exp(x_N - tl.max(x_N, 0))
        x_N = x_N / tl.sum(x_N, 0)
    elif KIND == "sigmoid":
        x_N = tl.sigmoid(x_N)
    chosen = (n < N) & (place_N < K)
    tl.store(value_ptr + place_N, x_N, mask=chosen)
    tl.store(index_ptr + place_N, n.to(tl.int64), mask=chosen)


@torch.library.custom_op("star_attention::scores", mutates_args=())
def scores(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a single row by a matrix, both of any precision; sums are in fp32.

    Args:
        x: The row, `[..., K]`.
        weight: The matrix, `[N, K]`, whose rows are contiguous.
        dtype: Precision of the result, `[..., N]`.
    """
    out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    triton_row.launch(x.contiguous(), [Product(weight, None, None, out)])
    return out


@scores.register_fake
def _(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


@torch.library.custom_op("star_attention::largest", mutates_args=())
def largest(x: Tensor, k: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest numbers of a single row, and their places, from the largest on.

    Args:
        x: The row, `[..., N]`; `MOST_SCORES` at most.
        k: How many.
        kind: One of `KINDS`: what is computed of the row before.
        dtype: Precision of the results.
    """
    values, places = (x.new_empty(*x.shape[:-1], k, dtype=each) for each in (dtype, torch.int64))
    N = x.shape[-1]
    _largest[(1,)](
        x.contiguous(), values, places, N, k,
        BLOCK=max(_COMPARED.value, triton.next_power_of_2(N)), KIND=kind,
        num_warps=4 if N <= 128 else 8, **triton_pdl.options(x.device),
    )  # fmt: skip
    return values, places


@largest.register_fake
def _(x: Tensor, k: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(*x.shape[:-1], k, dtype=dtype),
        x.new_empty(*x.shape[:-1], k, dtype=torch.int64),
    )
