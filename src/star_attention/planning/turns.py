"""Turns in which ranks encode a context side by side, and pause together.

Standard library only.
"""

from __future__ import annotations

from star_attention.planning.plan import BlockPlan


def forwards_by_turn(
    plan: BlockPlan, tokens_per_forward: int, *, rank: int, local_anchor: bool
) -> list[int]:
    """Return how many forwards of phase 1 a rank runs in each turn; all ranks have as many turns.

    No forward waits for one of a later turn: in the first turn rank 0 computes the whole anchor,
    which the other ranks' first forward waits for. Stripes, which wait for each other, have no such
    turns.

    Args:
        plan: the context's plan.
        tokens_per_forward: most tokens of a forward.
        rank: the context-parallel rank.
        local_anchor: True if each rank computes the anchor by itself.
    """
    assert plan.stripes is None, "stripes wait for each other"
    own = [
        _forwards(plan, tokens_per_forward, each, local_anchor=local_anchor)
        for each in range(plan.ranks)
    ]
    turns = max(map(len, own))
    return own[rank] + [0] * (turns - len(own[rank]))


def _forwards(
    plan: BlockPlan, tokens_per_forward: int, rank: int, *, local_anchor: bool
) -> list[int]:
    spans = list(plan.spans(tokens_per_forward, rank=rank))
    others_wait = plan.busy_ranks > 1 and plan.anchor_size > 0
    if not others_wait:
        return [1] * len(spans)
    if local_anchor:
        own_anchor = -(-plan.anchor_size // tokens_per_forward) if rank else 0
        return [1] * (own_anchor + len(spans)) if spans else []
    if rank:
        return [1] * len(spans)
    first = sum(span.start < plan.anchor_size for span in spans)
    return [first] + [1] * (len(spans) - first)
