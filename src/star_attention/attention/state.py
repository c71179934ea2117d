"""Attention states: a result over some set of keys that can be merged with results over other keys, exactly.

Axes: B batch, Q query rows, H query heads, D head size.

For one query row with scores s_j over a key set K, the state is `out = sum_j exp(s_j - lse) v_j` and
`lse = log sum_j exp(s_j)`. States over disjoint sets merge into the state of the union (paper, section 2.2, Algorithm 2;
its printed line 19 has a sign misplaced, the weights below are the right ones). `merge` is associative and commutative and an
empty state (`out = 0`, `lse = -inf`) is its identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from star_attention.attention.kernels import triton_works


class State(NamedTuple):
    """`out_BQHD` in the working dtype or fp32, and `lse_BQH` in fp32, natural logarithm."""

    out_BQHD: Tensor
    lse_BQH: Tensor


def empty_state(
    batch: int, queries: int, heads: int, head_size: int, device: torch.device
) -> State:
    """The state over no keys: `out = 0`, `lse = -inf`, both fp32."""
    out_BQHD = torch.zeros(batch, queries, heads, head_size, dtype=torch.float32, device=device)
    lse_BQH = torch.full((batch, queries, heads), float("-inf"), dtype=torch.float32, device=device)
    return State(out_BQHD, lse_BQH)


def merge(states: Sequence[State], *, dtype: torch.dtype | None = None) -> State:
    """The state over the union of disjoint key sets; fp32 for two or more states, one state comes back as it is.

    dtype: to what the merged `out` may be rounded at the end, where nothing is merged to it any more.
    """
    assert states, "merge needs at least one state"
    merged = states[0]
    for number, state in enumerate(states[1:], start=2):
        merged = merge_last(merged, state, dtype=dtype if number == len(states) else None)
    return merged


def merge_last(state: State, more: State, *, dtype: torch.dtype | None = None) -> State:
    """The same for two states, of which the second may be of the last query rows only: the rows before see none of its keys."""
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
    # The sigmoid form cannot overflow, whatever the gap between the lse (the textbook `lse + log(1 + exp(gap))` does above 88 in
    # fp32).
    gap_BQH = a.lse_BQH - b.lse_BQH
    # Both empty: -inf - -inf is NaN, and any weight is right for two zero rows.
    weight_BQH = torch.sigmoid(gap_BQH).nan_to_num(0.0)
    out_BQHD = torch.lerp(b.out_BQHD.float(), a.out_BQHD.float(), weight_BQH[..., None])
    return State(out_BQHD, torch.logaddexp(a.lse_BQH, b.lse_BQH))


def add_sink(state: State, sink_H: Tensor) -> State:
    """Let a learned sink (GPT-OSS) take its share: one more term `exp(sink)` in every denominator, with no value.

    To be applied once, after the last merge.
    """
    sink_H = sink_H.float()
    share_BQH = torch.sigmoid(state.lse_BQH - sink_H)
    return State(
        state.out_BQHD.float() * share_BQH[..., None], torch.logaddexp(state.lse_BQH, sink_H)
    )
