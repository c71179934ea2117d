"""The layout of ring attention: which tokens each rank holds. Standard library only."""

from __future__ import annotations

from itertools import pairwise

from star_attention.planning.segments import Segments

RING_LAYOUTS = ("zigzag", "contiguous")
"""How ring attention assigns tokens to ranks, see `ring_layout`."""


def ring_layout(
    context_tokens: int, ranks: int, kind: str = RING_LAYOUTS[0]
) -> tuple[Segments, ...]:
    """Return the tokens that each rank holds in ring attention.

    Args:
        context_tokens: length of the context; one with fewer than two tokens per rank stays whole,
            on the first rank.
        ranks: context-parallel ranks.
        kind: "zigzag" cuts the context into two runs per rank and gives rank r the r-th from the
            start and the r-th from the end, so that causal attention is the same work for all;
            "contiguous" gives each rank one run.
    """
    if context_tokens < 2 * ranks:
        return (Segments.prefix(context_tokens), *(Segments(),) * (ranks - 1))
    runs = ranks if kind == "contiguous" else 2 * ranks
    cuts = [run * context_tokens // runs for run in range(runs + 1)]
    cut = [(start, stop) for start, stop in pairwise(cuts)]
    if ranks == 1:
        return (Segments.prefix(context_tokens),)
    if kind == "contiguous":
        return tuple(Segments([run]) for run in cut)
    return tuple(Segments([cut[rank], cut[-1 - rank]]) for rank in range(ranks))
