"""Law 3: merging attention states is associative and commutative, with the empty state as identity.

Axes: B batch, Q query rows, H query heads, D head size, K keys.
"""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from star_attention.attention.oracle import masked_attention
from star_attention.attention.state import State, add_sink, empty_state, merge
from tests.tolerances import EXACT

B, Q, H, D = 2, 5, 3, 4
CPU = torch.device("cpu")

# Log-sum-exps far apart and close together, and rows without keys.
LSE = st.one_of(st.just(float("-inf")), st.floats(-1e4, 1e4, width=32), st.floats(-3, 3, width=32))
LSES = st.lists(LSE, min_size=3, max_size=3)


def state(lse: float, seed: int, dtype: torch.dtype = torch.float32) -> State:
    """Make a state whose rows all have one lse; rows without keys are zero."""
    generator = torch.Generator().manual_seed(seed)
    out_BQHD = torch.randn(B, Q, H, D, generator=generator).to(dtype)
    if lse == float("-inf"):
        out_BQHD = torch.zeros_like(out_BQHD)
    return State(out_BQHD, torch.full((B, Q, H), lse))


def assert_same(a: State, b: State) -> None:
    """Compare to rounding: an lse of thousands has few exact digits, as have its weights."""
    largest = max(
        (s.lse_BQH[s.lse_BQH.isfinite()].abs().max().item() if s.lse_BQH.isfinite().any() else 0)
        for s in (a, b)
    )
    slack = EXACT + 8 * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(a.out_BQHD, b.out_BQHD, atol=slack, rtol=0)
    torch.testing.assert_close(a.lse_BQH, b.lse_BQH, atol=slack, rtol=0)


def over(keys: list[int], q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> State:
    """Compute the oracle's state over some of the keys, in float32."""
    keep_QK = torch.zeros(Q, k_BKHD.shape[1], dtype=torch.bool)
    keep_QK[:, keys] = True
    out_BQHD, lse_BQH = masked_attention(q_BQHD, k_BKHD, v_BKHD, keep_QK, scale=0.7)
    return State(out_BQHD.float(), lse_BQH)


@pytest.mark.parametrize("cuts", [(3, 7), (0, 7), (7, 7), (0, 0), (0, 11), (11, 11), (1, 10)])
def test_states_over_parts_merge_into_the_state_over_the_whole(cuts: tuple[int, int]) -> None:
    """Parts may be empty."""
    generator = torch.Generator().manual_seed(0)
    q_BQHD, k_BKHD, v_BKHD = (torch.randn(B, n, H, D, generator=generator) for n in (Q, 11, 11))
    parts = [range(cuts[0]), range(*cuts), range(cuts[1], 11)]
    states = [over(list(part), q_BQHD, k_BKHD, v_BKHD) for part in parts]
    whole = over(list(range(11)), q_BQHD, k_BKHD, v_BKHD)
    for order in itertools.permutations(states):
        assert_same(merge(order), whole)


@given(LSES)
@settings(deadline=None)
def test_merge_is_associative(lses: list[float]) -> None:
    a, b, c = (state(lse, seed) for seed, lse in enumerate(lses))
    assert_same(merge([merge([a, b]), c]), merge([a, merge([b, c])]))
    assert_same(merge([a, b, c]), merge([merge([a, b]), c]))


@given(LSES)
@settings(deadline=None)
def test_merge_is_commutative(lses: list[float]) -> None:
    states = [state(lse, seed) for seed, lse in enumerate(lses)]
    first = merge(states)
    for order in itertools.permutations(states):
        assert_same(merge(order), first)


@given(LSE)
@settings(deadline=None)
def test_an_empty_state_is_the_identity(lse: float) -> None:
    a, empty = state(lse, 0), empty_state(B, Q, H, D, CPU)
    for merged in (merge([a, empty]), merge([empty, a]), merge([empty, a, empty])):
        assert torch.equal(merged.out_BQHD, a.out_BQHD)
        assert torch.equal(merged.lse_BQH, a.lse_BQH)


def test_empty_states_merge_into_an_empty_state() -> None:
    """Forbids the NaN of -inf minus -inf."""
    empty = empty_state(B, Q, H, D, CPU)
    merged = merge([empty, empty, empty])
    assert torch.equal(merged.out_BQHD, torch.zeros(B, Q, H, D))
    assert torch.equal(merged.lse_BQH, torch.full((B, Q, H), float("-inf")))


@pytest.mark.parametrize("gap", [89.0, 1e4, 3e38])
def test_a_huge_gap_does_not_overflow(gap: float) -> None:
    """Forbids `lse + log(1 + exp(gap))`, which is infinite above 88 in float32."""
    low, high = state(-gap, 0), state(gap, 1)
    for merged in (merge([low, high]), merge([high, low])):
        torch.testing.assert_close(merged.out_BQHD, high.out_BQHD)
        torch.testing.assert_close(merged.lse_BQH, high.lse_BQH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_computes_in_float32(dtype: torch.dtype) -> None:
    """Forbids rounding to half precision in every merge."""
    states = [state(0.01 * seed, seed, dtype) for seed in range(9)]
    merged = merge(states)
    assert (merged.out_BQHD.dtype, merged.lse_BQH.dtype) == (torch.float32, torch.float32)
    assert_same(merged, merge([State(s.out_BQHD.float(), s.lse_BQH) for s in states]))


def test_a_single_state_is_returned_as_it_is() -> None:
    alone = state(1.0, 0, torch.bfloat16)
    assert merge([alone]) is alone
    with pytest.raises(AssertionError, match="at least one state"):
        merge([])


def test_rows_and_heads_merge_independently() -> None:
    """Forbids weights along the wrong axis."""
    a, b = state(0.0, 0), state(0.0, 1)
    generator = torch.Generator().manual_seed(2)
    lse_BQH = 5 * torch.randn(B, Q, H, generator=generator)
    merged = merge([State(a.out_BQHD, lse_BQH), State(b.out_BQHD, -lse_BQH)])
    weight_BQH1 = torch.exp(lse_BQH)[..., None]
    expected_BQHD = (a.out_BQHD * weight_BQH1 + b.out_BQHD / weight_BQH1) / (
        weight_BQH1 + 1 / weight_BQH1
    )
    torch.testing.assert_close(merged.out_BQHD, expected_BQHD, atol=EXACT, rtol=EXACT)


@given(LSE, st.lists(st.floats(-50, 50, width=32), min_size=H, max_size=H))
@settings(deadline=None)
def test_a_sink_is_one_more_term_without_a_value(lse: float, sinks: list[float]) -> None:
    a, sink_H = state(lse, 0, torch.bfloat16), torch.tensor(sinks)
    term = State(torch.zeros(B, Q, H, D), sink_H.expand(B, Q, H))
    assert_same(
        add_sink(a, sink_H.bfloat16().float()),
        merge([a, term._replace(lse_BQH=sink_H.bfloat16().float().expand(B, Q, H))]),
    )
    with_sink = add_sink(a, sink_H)
    assert with_sink.out_BQHD.dtype == with_sink.lse_BQH.dtype == torch.float32
    assert_same(with_sink, merge([a, term]))


def test_a_sink_alone_takes_all_weight() -> None:
    nothing = add_sink(empty_state(B, Q, H, D, CPU), torch.tensor([1.0, -2.0, 3.0]))
    assert torch.equal(nothing.out_BQHD, torch.zeros(B, Q, H, D))
    assert torch.equal(nothing.lse_BQH, torch.tensor([1.0, -2.0, 3.0]).expand(B, Q, H))
