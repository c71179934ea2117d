"""Which blocks of a changed context are encoded again, and by which rank. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.windows import Windows, first_kept


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one context-parallel rank encodes again.

    Attributes:
        owner: the rank.
        runs: `(start, stop)` of the tokens, whole blocks.
    """

    owner: int
    runs: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(stop - start for start, stop in self.runs)


def blocks_again(
    plan: BlockPlan,
    old_ids: Sequence[int],
    new_ids: Sequence[int],
    lookbacks: Sequence[int],
    windows: Windows,
) -> list[int]:
    """Return the numbers of the blocks whose keys and values differ from those of an old context.

    A block depends on the anchor and on its own tokens, each of them on those before it. Where a
    layer looks back, what it returns for a block depends on blocks before it, and so do the keys of
    the next layer: the reach grows from layer to layer. Keys of the last layer that stores any
    depend on the layers below alone.

    Args:
        plan: the plan of the new context; the old one has the same sizes.
        old_ids: token ids of the old context.
        new_ids: those of the new one.
        lookbacks: blocks that each layer looks back, up to the last layer that stores keys.
        windows: sliding windows of these layers in tokens, None for full attention.
    """
    blocks, anchor = plan.blocks, plan.anchor_size
    if old_ids[:anchor] != new_ids[:anchor]:
        return list(range(len(blocks)))
    again = {
        number
        for number, (start, stop) in enumerate(blocks)
        if old_ids[start:stop] != new_ids[start:stop]
    }
    for lookback, window in list(zip(lookbacks, windows, strict=True))[:-1]:
        if lookback and again:
            again |= {
                number
                for number in range(min(again) + 1, len(blocks))
                if again.intersection(_seen(plan, number, lookback, window))
            }
    return sorted(again)


def _seen(plan: BlockPlan, number: int, lookback: int, window: int | None) -> range:
    """Return the blocks before its own that a block sees in a layer, beside the anchor."""
    first = number - lookback
    if window is not None:
        first = max(first, (number * plan.block_size - window + 1) // plan.block_size)
    return range(max(0, first), number)


def blocks_with_windows(
    plan: BlockPlan, again: Collection[int], old_tokens: int, windows: Windows
) -> list[int]:
    """Return the blocks of a changed context to encode again, given those that differ.

    Added are blocks of which later tokens now see what an old context has dropped, and the first
    one where the anchor is in a window: all of the anchor that the old context may have dropped.

    Args:
        plan: the plan of the new context.
        again: numbers of the blocks that differ from those of the old one.
        old_tokens: tokens of the old context.
        windows: windows of the layers of which either context drops tokens, else None.
    """
    blocks = set(again)
    for window in {window for window in windows if window is not None}:
        kept_before = first_kept(old_tokens, window)
        first = first_kept(plan.context_tokens, window)
        blocks |= {
            number
            for number, (start, stop) in enumerate(plan.blocks)
            if max(start, first) < min(stop, kept_before)
        }
    starts = [plan.blocks[number][0] for number in blocks]
    if any(_sees_anchor(plan, start, window) for start in starts for window in windows):
        blocks.add(0)
    return sorted(blocks)


def lacks_windows(
    plan: BlockPlan, rounds: Sequence[list[Share]], lookbacks: Sequence[int], windows: Windows
) -> bool:
    """True if encoding a context's changes takes keys that its old version has dropped.

    Args:
        plan: the plan of the new context.
        rounds: what ranks encode again, as `rounds` returns it.
        lookbacks: blocks that each layer looks back.
        windows: windows of the layers of which either version drops tokens, else None.
    """
    return any(
        lookback > 0 or (_sees_anchor(plan, start, window) and not has_anchor)
        for start, has_anchor in _starts(plan, rounds)
        for lookback, window in zip(lookbacks, windows, strict=True)
        if window is not None and start > 0
    )


def _starts(plan: BlockPlan, rounds: Sequence[list[Share]]) -> Iterator[tuple[int, bool]]:
    """Yield where each run starts, and True if the rank has encoded the anchor just before."""
    for share in [share for shares in rounds for share in shares]:
        for start, _ in share.runs:
            # Where blocks look back, each run is a round of its own.
            yield start, share.runs[0][0] == 0 and not plan.lookback


def _sees_anchor(plan: BlockPlan, start: int, window: int | None) -> bool:
    """True if a block after the first sees a part of the anchor in a layer with a window."""
    return window is not None and 0 < start < plan.anchor_size + window - 1


def rounds(
    plan: BlockPlan,
    again: Collection[int],
    layout: Sequence[Segments],
    old_layout: Sequence[Segments],
) -> list[list[Share]]:
    """Return who encodes what: rounds, one after another, of ranks that work at the same time.

    A rank also encodes blocks that are the same, but that only another rank held. Where blocks look
    back, each run of blocks waits for those before it.

    Args:
        plan: the plan of the new context.
        again: numbers of the blocks that differ.
        layout: the tokens that each rank will hold.
        old_layout: those that it holds of the old context.
    """
    shares = []
    for owner, segments in enumerate(layout):
        runs: list[tuple[int, int]] = []
        for number, (start, stop) in enumerate(plan.blocks):
            if not segments.holds(start):
                continue
            if number not in again and old_layout[owner].within(start, stop) == [(start, stop)]:
                continue
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        if runs:
            shares.append(Share(owner=owner, runs=runs))
    if not plan.lookback:
        return [shares] if shares else []
    single = [Share(owner=share.owner, runs=[run]) for share in shares for run in share.runs]
    return [[share] for share in sorted(single, key=lambda share: share.runs)]


def copied_runs(
    plan: BlockPlan, segments: Segments, old: Segments, encoded: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the runs of tokens that a rank copies from an old context.

    The anchor is one of them, even where the rest of its block is encoded again: other ranks ask
    for it before.

    Args:
        plan: the plan of the new context.
        segments: the tokens that the rank will hold.
        old: those that it holds of the old context.
        encoded: those that it encodes again.
    """
    runs = []
    for start, stop in plan.blocks:
        if not segments.holds(start):
            continue
        if any(first <= start < last for first, last in encoded):
            stop = min(stop, plan.anchor_size)
        runs += old.within(start, stop)
    return runs
