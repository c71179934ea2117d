"""Turns in which ranks encode side by side: all have as many, and none waits for a later one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention.planning.plan import BlockPlan
from star_attention.planning.turns import forwards_by_turn


@settings(deadline=None)
@given(
    tokens=st.integers(1, 200),
    block=st.integers(1, 40),
    anchor=st.integers(0, 40),
    ranks=st.integers(1, 5),
    size=st.integers(1, 60),
    local=st.booleans(),
)
def test_ranks_pause_together(
    tokens: int, block: int, anchor: int, ranks: int, size: int, local: bool
) -> None:
    anchor = min(anchor, block)
    plan = BlockPlan(context_tokens=tokens, block_size=block, anchor_size=anchor, ranks=ranks)
    turns = [forwards_by_turn(plan, size, rank=rank, local_anchor=local) for rank in range(ranks)]
    assert len({len(each) for each in turns}) == 1
    for rank, each in enumerate(turns):
        spans = list(plan.spans(size, rank=rank))
        repeats_anchor = local and 0 < rank < plan.busy_ranks
        assert sum(each) == len(spans) + (-(-anchor // size) if repeats_anchor else 0)
        # Ranks begin together, so that none has turns alone at the end.
        assert each == sorted(each, reverse=True)
    if plan.busy_ranks > 1 and anchor and not local:
        # Other ranks' first forwards read the whole anchor.
        first = list(plan.spans(size))[: turns[0][0]]
        assert first[-1].stop >= anchor
        assert all(count <= 1 for each in turns[1:] for count in each)
