"""Attention of rows that each see the keys up to one of their own, in Triton: no mask in memory.

Axes: Q query rows, K keys, H query heads, G KV heads, M rows of a program, N keys of a step,
D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import Call, half_precision_cuda
from star_attention.attention.state import State

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(
    q_MD, k_ptr, v_ptr, last_M, top_M, sum_M, out_MD, at, keys, scale, window, k_k, v_k,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, LIMITED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    n = at + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < keys)[:, None] & (d < D)[None, :]
    n64 = n.to(tl.int64)[:, None]
    # Loads without a mask are faster.
    if MASKED:
        k_ND = tl.load(k_ptr + n64 * k_k + d[None, :], mask=mask, other=0.0)
    else:
        k_ND = tl.load(k_ptr + n64 * k_k + d[None, :])
    scores_MN = tl.dot(q_MD, tl.trans(k_ND)) * (scale * _LOG2_E)
    if LIMITED:
        back_MN = last_M[:, None] - n[None, :]
        visible = back_MN >= 0
        if WINDOW:
            visible = visible & (back_MN < window)
        scores_MN = tl.where(visible & (n < keys)[None, :], scores_MN, float("-inf"))
    new_M = tl.maximum(top_M, tl.max(scores_MN, 1))
    safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    shrink_M = tl.exp2(top_M - safe_M)
    weight_MN = tl.exp2(scores_MN - safe_M[:, None])
    if MASKED:
        v_ND = tl.load(v_ptr + n64 * v_k + d[None, :], mask=mask, other=0.0)
    else:
        v_ND = tl.load(v_ptr + n64 * v_k + d[None, :])
    out_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, acc=out_MD * shrink_M[:, None])
    return new_M, sum_M * shrink_M + tl.sum(weight_MN, 1), out_MD


@triton.jit(do_not_specialize=["window", "queries", "keys"])
def _rows(
    q_ptr, k_ptr, v_ptr, last_ptr, out_ptr, lse_ptr,
    scale, window, queries, keys,
    q_q, q_h, k_k, k_g, v_k, v_g,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    g = (h // (HEADS // KV_HEADS)).to(tl.int64)
    # The last rows see most keys, and go first.
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = m < queries
    d = tl.arange(0, BLOCK_D)
    rows_mask = row_mask[:, None] & (d < D)[None, :]
    q_MD = tl.load(
        q_ptr + m.to(tl.int64)[:, None] * q_q + h * q_h + d[None, :], mask=rows_mask, other=0.0
    )
    last_M = tl.load(last_ptr + m, mask=row_mask, other=-1)
    k_ptr += g * k_g
    v_ptr += g * v_g

    stop = tl.minimum(tl.max(last_M) + 1, keys)
    start = 0
    # Keys before `limit` are seen by all rows, which are in the order of their last keys.
    limit = 0
    if WINDOW:
        first = tl.min(tl.where(row_mask, last_M, 2147483647)) - window + 1
        start = tl.maximum(first, 0) // BLOCK_N * BLOCK_N
        limit = start
    else:
        seen = tl.min(tl.where(row_mask, last_M, 2147483647)) + 1
        limit = tl.minimum(tl.maximum(seen, 0), keys) // BLOCK_N * BLOCK_N

    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    out_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in tl.range(start, limit, BLOCK_N):
        top_M, sum_M, out_MD = _step(
            q_MD, k_ptr, v_ptr, last_M, top_M, sum_M, out_MD, at, keys, scale, window, k_k, v_k,
            D, BLOCK_N, BLOCK_D, PADDED, False, False,
        )  # fmt: skip
    for at in tl.range(limit, stop, BLOCK_N):
        top_M, sum_M, out_MD = _step(
            q_MD, k_ptr, v_ptr, last_M, top_M, sum_M, out_MD, at, keys, scale, window, k_k, v_k,
            D, BLOCK_N, BLOCK_D, True, True, WINDOW,
        )  # fmt: skip

    has_keys_M = sum_M > 0.0
    sum_M = tl.where(has_keys_M, sum_M, 1.0)
    place_M = m.to(tl.int64) * HEADS + h
    tl.store(out_ptr + place_M[:, None] * D + d[None, :], out_MD / sum_M[:, None], mask=rows_mask)
    lse_M = tl.where(has_keys_M, (top_M + tl.log2(sum_M)) / _LOG2_E, float("-inf"))
    tl.store(lse_ptr + place_M, lse_M, mask=row_mask)


def unsupported(call: Call, v_size: int) -> list[str]:
    """Return the reasons why the kernel cannot run a call, none if it can.

    Args:
        call: shape of the call.
        v_size: elements of a value.
    """
    reasons = half_precision_cuda(call, head_size_limit=256)
    if v_size != call.head_size:
        reasons.append(f"takes keys and values of one size, not {call.head_size} and {v_size}")
    return reasons


def attend(q_1QHD: Tensor, k_1KGD: Tensor, v_1KGD: Tensor, *, rule: Rule, last_Q: Tensor) -> State:
    """Compute attention of rows, each of which sees the keys up to `last_Q`, in the window.

    Args:
        q_1QHD: queries.
        k_1KGD: keys.
        v_1KGD: values.
        rule: scale, window, and the precision of the result.
        last_Q: index of each row's last key, int32 and increasing; below 0 it sees none.
    """
    (B, Q, H, D), (K, G) = q_1QHD.shape, k_1KGD.shape[1:3]
    assert B == 1, "rows of one context"
    q_1QHD, k_1KGD, v_1KGD = (
        t if t.stride(3) == 1 else t.contiguous() for t in (q_1QHD, k_1KGD, v_1KGD)
    )
    out_1QHD = torch.empty(1, Q, H, D, dtype=rule.dtype or torch.float32, device=q_1QHD.device)
    lse_1QH = torch.empty(1, Q, H, dtype=torch.float32, device=q_1QHD.device)
    block_d = max(16, triton.next_power_of_2(D))
    block_m, block_n = (128, 64) if block_d <= 128 else (64, 32)
    _rows[(H, triton.cdiv(Q, block_m))](
        q_1QHD, k_1KGD, v_1KGD, last_Q, out_1QHD, lse_1QH,
        rule.scale, rule.window or 0, Q, K,
        *q_1QHD.stride()[1:3], *k_1KGD.stride()[1:3], *v_1KGD.stride()[1:3],
        HEADS=H, KV_HEADS=G, D=D, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        PADDED=D != block_d, WINDOW=rule.window is not None,
        num_warps=8 if block_d <= 128 else 4, num_stages=2,
    )  # fmt: skip
    return State(out_1QHD, lse_1QH)
