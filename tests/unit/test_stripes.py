"""Stripes of blocks on several ranks, and what these send each other, in integers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention.planning.exchange import in_round, to_extend
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from tests.plans import block_plans

PLANS = block_plans(
    tokens=300,
    block_size=40,
    ranks=st.integers(2, 7),
    lookback=st.integers(1, 9),
    stripe_tokens=200,
)

WINDOWS = st.none() | st.integers(1, 150)


def tokens_of(runs: Segments) -> list[int]:
    return [token for start, stop in runs for token in range(start, stop)]


@settings(deadline=None)
@given(PLANS)
def test_ranks_take_stripes_in_turn(plan: BlockPlan) -> None:
    stripes = plan.stripes
    assert stripes is not None
    assert tokens_of(Segments(stripes.runs)) == list(range(plan.context_tokens))
    starts = [start for start, _ in plan.blocks]
    assert all(start in starts for start, _ in stripes.runs)
    assert stripes.longest <= max(plan.block_size, plan.stripe_tokens)
    for rank in range(plan.ranks):
        assert tokens_of(plan.layout[rank]) == tokens_of(Segments(plan.rank_blocks(rank)))
        assert plan.layout[rank] == Segments(stripes.runs[rank :: plan.ranks])
    assert sum(bool(runs) for runs in plan.layout) == plan.busy_ranks


@settings(deadline=None)
@given(PLANS)
def test_no_layout_takes_fewer_blocks_one_after_another(plan: BlockPlan) -> None:
    stripes = plan.stripes
    assert stripes is not None
    blocks = [-(-(stop - start) // plan.block_size) for start, stop in stripes.runs]
    rounds = [max(blocks[at : at + plan.ranks]) for at in range(0, len(blocks), plan.ranks)]
    assert sum(rounds) == -(-plan.num_blocks // plan.ranks)


@settings(deadline=None)
@given(PLANS, st.integers(1, 100))
def test_a_stripe_is_one_forward_and_a_short_last_block_another(
    plan: BlockPlan, tokens_per_forward: int
) -> None:
    for rank in range(plan.ranks):
        spans = list(plan.spans(tokens_per_forward, rank=rank))
        assert tokens_of(Segments((s.start, s.stop) for s in spans)) == tokens_of(plan.layout[rank])
        later = {span.start for span in spans} - {start for start, _ in plan.layout[rank]}
        assert later <= {plan.blocks[-1][0]}
        assert all(span.block_start == span.start for span in spans)


@settings(max_examples=200, deadline=None)
@given(PLANS, st.booleans(), st.integers(0, 9), WINDOWS)
def test_every_rank_gets_what_its_blocks_see_once_and_in_time(
    plan: BlockPlan, anchor: bool, lookback: int, window: int | None
) -> None:
    stripes = plan.stripes
    assert stripes is not None
    anchor = anchor and plan.anchor_size > 0
    received: list[list[int]] = [[] for _ in range(plan.ranks)]
    for number in range(stripes.rounds):
        working = len(stripes.runs) - number * plan.ranks
        for transfer in in_round(plan, number, lookback, window, anchor=anchor):
            assert transfer.source != transfer.target
            assert max(transfer.source, transfer.target) < working, "others would be waited for"
            run = stripes.of_rank(transfer.source)[number]
            assert run[0] <= transfer.start < transfer.stop <= run[1], "computed in this round"
            received[transfer.target] += range(transfer.start, transfer.stop)
        for rank in range(min(plan.ranks, working)):
            start, stop = stripes.of_rank(rank)[number]
            seen = set(range(plan.first_seen(start, lookback, window), start))
            if anchor:
                seen |= set(range(min(plan.anchor_size, start)))
            own = set(tokens_of(plan.layout[rank]))
            assert seen <= own | set(received[rank])
            assert all(token < stop or token not in own for token in received[rank])
    for tokens in received:
        assert len(tokens) == len(set(tokens))


@settings(max_examples=200, deadline=None)
@given(PLANS, st.integers(0, 9), WINDOWS, st.integers(1, 100))
def test_the_owner_of_the_last_token_gets_what_new_tokens_see(
    plan: BlockPlan, lookback: int, window: int | None, more: int
) -> None:
    start = plan.context_tokens
    owner = next(rank for rank, runs in enumerate(plan.layout) if runs and runs[-1][1] == start)
    longer = BlockPlan.resolve(
        start + more, plan.block_size, plan.anchor_size, plan.ranks, lookback
    )
    received: list[int] = []
    for transfer in to_extend(longer, plan.layout, lookback, window, start=start, owner=owner):
        assert transfer.target == owner != transfer.source
        assert plan.layout[transfer.source].within(transfer.start, transfer.stop) == [
            (transfer.start, transfer.stop)
        ], "held in one run"
        received += range(transfer.start, transfer.stop)
    assert len(received) == len(set(received))
    block = start // plan.block_size * plan.block_size
    seen = set(range(longer.first_seen(block, lookback, window), start))
    seen |= set(range(min(plan.anchor_size, start)))
    own = set(tokens_of(plan.layout[owner]))
    assert seen <= own | set(received)
    assert not own & set(received)


def test_without_lookback_the_layout_is_contiguous() -> None:
    sizes = dict(context_tokens=100, block_size=10, anchor_size=5, ranks=3)
    assert BlockPlan(**sizes).layout == (((0, 40),), ((40, 70),), ((70, 100),))
    assert BlockPlan(**sizes, lookback=1, stripe_tokens=20).layout == (
        ((0, 20), (60, 80)),
        ((20, 40), (80, 90)),
        ((40, 60), (90, 100)),
    )


@settings(deadline=None)
@given(PLANS, st.integers(0, 9), st.integers(1, 150))
def test_nothing_travels_that_a_window_does_not_reach(
    plan: BlockPlan, lookback: int, window: int
) -> None:
    """Only the anchor, which begins a run that would begin inside it."""
    stripes = plan.stripes
    assert stripes is not None
    for number in range(stripes.rounds):
        for transfer in in_round(plan, number, lookback, window, anchor=False):
            starts = [start for start, _ in stripes.of_rank(transfer.target)]
            reader = min(start for start in starts if start >= transfer.stop)
            reached = reader - (window - 1)
            assert transfer.start >= reached or transfer.start < plan.anchor_size
