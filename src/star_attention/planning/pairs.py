"""Pairs of a query and a key that it sees, counted in closed form.

They are exactly the ones in the law's mask (`attention/oracle.py`). Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from star_attention.planning.plan import BlockPlan

Runs = Sequence[tuple[int, int]]
"""`(start, stop)` of the tokens of consecutive blocks."""


def causal_pairs(tokens: int, window: int | None = None) -> int:
    """Count the pairs (i, j) with `j <= i` and `i - j < window` among `tokens` tokens."""
    w = tokens if window is None else min(window, tokens)
    return w * (w + 1) // 2 + (tokens - w) * w


def anchor_pairs(start: int, stop: int, anchor_size: int, window: int | None = None) -> int:
    """Count the pairs of tokens `start..stop`, which follow the anchor, with anchor tokens."""
    if window is None:
        return (stop - start) * anchor_size
    # Token i reaches back to i - window + 1. Before `first` it sees the whole anchor, from `end` on
    # nothing of it, and between them one anchor token less with each step.
    first = min(max(start, window - 1), stop)
    end = min(max(first, anchor_size + window - 1), stop)
    most, least = (anchor_size + window - 1 - i for i in (first, end))
    return (first - start) * anchor_size + (most * (most + 1) - least * (least + 1)) // 2


def blocks_of(plan: BlockPlan, runs: Runs) -> Iterator[tuple[int, int]]:
    """Yield the blocks of runs."""
    for first, last in runs:
        for start in range(first, last, plan.block_size):
            yield start, min(start + plan.block_size, last)


def context_pairs(
    plan: BlockPlan, window: int | None = None, runs: Runs | None = None, lookback: int = 0
) -> int:
    """Count the pairs of phase 1 (the ones in the law's mask).

    Args:
        plan: blocks and anchor.
        window: sliding window of the layer in tokens, None for full attention.
        runs: runs of blocks whose queries count; None counts all.
        lookback: blocks that the layer looks back.
    """
    pairs = 0
    for start, stop in blocks_of(plan, [(0, plan.context_tokens)] if runs is None else runs):
        first = plan.first_seen(start, lookback)
        pairs += causal_pairs(stop - start, window)
        # The run before the block is to it what an anchor would be at the run's place.
        pairs += anchor_pairs(start - first, stop - first, start - first, window)
        if first > 0:
            pairs += anchor_pairs(start, stop, plan.anchor_size, window)
    return pairs


def renewed_pairs(plan: BlockPlan, share: float, *, sees_all: bool) -> int:
    """Count the pairs of tokens that a second look computes again, in a layer without a window.

    Args:
        plan: blocks and anchor.
        share: share of the context's tokens, counted as spread evenly over it.
        sees_all: whether they see all tokens before them, or only what they saw in phase 1 and the
            others before them.
    """
    if sees_all:
        return int(share * causal_pairs(plan.context_tokens))
    pairs = 0.0
    for start, stop in blocks_of(plan, [(0, plan.context_tokens)]):
        anchor = min(plan.anchor_size, start)
        from_afar = anchor + share * (start - anchor)
        pairs += share * (causal_pairs(stop - start) + (stop - start) * from_afar)
    return int(pairs)


def streaming_pairs(plan: BlockPlan, window: int | None = None) -> int:
    """Count the pairs of StreamingLLM's phase 1.

    Each token sees the last `block_size` tokens, and the first `anchor_size` tokens before them.
    """
    tokens = plan.context_tokens
    near = plan.block_size if window is None else min(plan.block_size, window)

    def sinks_beyond(size: int) -> int:
        return causal_pairs(max(0, tokens - size), plan.anchor_size) if plan.anchor_size else 0

    pairs = causal_pairs(tokens, near)
    if window is None:
        return pairs + sinks_beyond(plan.block_size)
    if window > plan.block_size:
        pairs += sinks_beyond(plan.block_size) - sinks_beyond(window)
    return pairs


def answer_pairs(context_tokens: int, new_tokens: int, window: int | None = None) -> int:
    """Count the pairs of phase 2 for `new_tokens` tokens after the context."""
    return causal_pairs(context_tokens + new_tokens, window) - causal_pairs(context_tokens, window)
