"""Attention states: results over some keys that merge exactly with results over other keys.

Axes: B batch, Q query rows, H query heads, D head size.

For one query row with scores s_j over a set of keys, the state is `out = sum_j exp(s_j - lse) v_j`
and `lse = log sum_j exp(s_j)`. States over disjoint sets merge into the state over their union
(paper, section 2.2, Algorithm 2; its printed line 19 has a wrong sign, which the weights below
correct). `merge` is associative and commutative, and the empty state (`out = 0`, `lse = -inf`) is
its identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from star_attention.attention.kernels import triton_works


class State(NamedTuple):
    """The result of attention over a set of keys.

    Attributes:
        out_BQHD: weighted mean of the values, in the working dtype or fp32.
        lse_BQH: natural logarithm of the sum of exponentials of the scores, fp32.
    """

    out_BQHD: Tensor
    lse_BQH: Tensor


def empty_state(
    batch: int, queries: int, heads: int, head_size: int, device: torch.device
) -> State:
    """Return the state over no keys: `out = 0`, `lse = -inf`, both fp32."""
    out_BQHD = torch.zeros(batch, queries, heads, head_size, dtype=torch.float32, device=device)
    lse_BQH = torch.full((batch, queries, heads), float("-inf"), dtype=torch.float32, device=device)
    return State(out_BQHD, lse_BQH)


def join_rows(states: Sequence[State], *, dtype: torch.dtype | None = None) -> State:
    """Return one state of the rows of several, in their order.

    Args:
        states: one or more. A single one is returned as it is.
        dtype: precision of the joined `out`, fp32 by default.
    """
    if len(states) == 1:
        return states[0]
    return State(
        torch.cat([state.out_BQHD.to(dtype or torch.float32) for state in states], 1),
        torch.cat([state.lse_BQH for state in states], 1),
    )


def join_batches(states: Sequence[State]) -> State:
    """Return one state of the batch rows of several, in their order."""
    if len(states) == 1:
        return states[0]
    return State(
        torch.cat([state.out_BQHD for state in states]),
        torch.cat([state.lse_BQH for state in states]),
    )


def merge(states: Sequence[State], *, dtype: torch.dtype | None = None) -> State:
    """Merge states over disjoint sets of keys into the state over their union.

    Args:
        states: one or more states of the same rows. A single one is returned as it is.
        dtype: precision of the merged `out`, fp32 by default. Round in the last merge only.
    """
    assert states, "merge needs at least one state"
    merged = states[0]
    for number, state in enumerate(states[1:], start=2):
        merged = merge_last(merged, state, dtype=dtype if number == len(states) else None)
    return merged


def merge_last(state: State, more: State, *, dtype: torch.dtype | None = None) -> State:
    """Merge two states, of which the second may cover the last query rows only.

    Args:
        state: the state of all rows.
        more: the state of the last rows, over other keys; the rows before see none of these.
        dtype: precision of the merged `out`, fp32 by default.
    """
    if triton_works(state.out_BQHD.device):
        from star_attention.attention.kernels import triton_merge

        return State(*triton_merge.merge(*state, *more, dtype=dtype or torch.float32))
    first = state.lse_BQH.shape[1] - more.lse_BQH.shape[1]
    last = _merge_two(State(state.out_BQHD[:, first:], state.lse_BQH[:, first:]), more)
    if first == 0:
        return last
    return State(
        torch.cat([state.out_BQHD[:, :first].float(), last.out_BQHD], 1),
        torch.cat([state.lse_BQH[:, :first], last.lse_BQH], 1),
    )


def _merge_two(a: State, b: State) -> State:
    # The sigmoid cannot overflow, whatever the gap between the lse. The textbook form,
    # `lse + log(1 + exp(gap))`, does in fp32 for gaps above 88.
    gap_BQH = a.lse_BQH - b.lse_BQH
    # If both are empty the gap is -inf + inf = NaN, and any weight is right for two zero rows.
    weight_BQH = torch.sigmoid(gap_BQH).nan_to_num(0.0)
    out_BQHD = torch.lerp(b.out_BQHD.float(), a.out_BQHD.float(), weight_BQH[..., None])
    return State(out_BQHD, torch.logaddexp(a.lse_BQH, b.lse_BQH))


def add_sink(state: State, sink_H: Tensor) -> State:
    """Add a learned attention sink (GPT-OSS): a term of the denominator that has no value.

    Apply it once, after the last merge.

    Args:
        state: the merged state.
        sink_H: the sink of each query head, as a score.
    """
    sink_H = sink_H.float()
    share_BQH = torch.sigmoid(state.lse_BQH - sink_H)
    return State(
        state.out_BQHD.float() * share_BQH[..., None], torch.logaddexp(state.lse_BQH, sink_H)
    )
