"""What ranks send each other where blocks look back, in integers. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from star_attention.planning.model_shape import AttentionShape, ModelShape
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments


@dataclass(frozen=True, kw_only=True, order=True)
class Transfer:
    """Keys and values of the tokens `start..stop` that one context-parallel rank sends another."""

    source: int
    target: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What decides what layers exchange, and for how long that takes.

    Attributes:
        token_bytes: bytes of a token's keys and values as computed.
        lookback: blocks that the layer looks back.
        call: its attention.
    """

    token_bytes: int
    lookback: int
    call: AttentionShape


def in_round(
    plan: BlockPlan, number: int, lookback: int, window: int | None = None, *, anchor: bool
) -> list[Transfer]:
    """Return the transfers of a layer in one round of phase 1, sorted.

    In a round every rank encodes a stripe. It sends the end of the stripe to all ranks that will
    look back to it, in this round or a later one: each receives it once, and ranks without a stripe
    have nothing to send or to receive. Rank 0 sends the anchor with its first stripe. A layer with
    a sliding window sends no more than the window reaches.

    Args:
        plan: the blocks, in stripes.
        number: the round, from 0.
        lookback: blocks that the layer looks back.
        window: sliding window of the layer in tokens, None for full attention.
        anchor: True if rank 0 sends the anchor.
    """
    stripes, ranks = plan.stripes, plan.ranks
    assert stripes is not None
    runs = stripes.runs
    transfers = []
    for stripe, (start, stop) in enumerate(stripes.of_round(number), number * ranks):
        # The next stripe of each other rank sees the most of this one.
        for reader in range(stripe + 1, min(stripe + ranks, len(runs))):
            first = max(start, plan.first_seen(runs[reader][0], lookback, window))
            parts = [(first, stop)]
            if anchor and stripe == 0 and first > 0:
                parts.append((0, plan.anchor_size))
            transfers += [
                Transfer(source=stripe % ranks, target=reader % ranks, start=a, stop=b)
                for a, b in parts
                if a < b
            ]
    return sorted(transfers)


def layer_kinds(shape: ModelShape, plan: BlockPlan) -> Counter[LayerKind]:
    """Count the layers that store keys and values, by what decides their exchanges."""
    lookbacks = plan.lookbacks(len(shape.kv_elements_by_layer))
    layers = zip(shape.kv_elements_by_layer, lookbacks, shape.attention, strict=True)
    return Counter(
        LayerKind(token_bytes=elements * shape.bytes_per_element, lookback=lookback, call=call)
        for elements, lookback, call in layers
        if elements
    )


def to_extend(
    plan: BlockPlan,
    layout: Sequence[Segments],
    lookback: int,
    window: int | None = None,
    *,
    start: int,
    owner: int,
    first_kept: int = 0,
) -> list[Transfer]:
    """Return what a layer of `owner` needs from other ranks to encode a context's new tokens.

    Args:
        plan: the plan of the extended context.
        layout: the tokens that each rank holds of the old one.
        lookback: blocks that the layer looks back.
        window: sliding window of the layer in tokens, None for full attention.
        start: first new token.
        owner: the context-parallel rank that encodes the new tokens.
        first_kept: first token that ranks keep of the layer, and that new tokens see.
    """
    first = plan.first_seen(start // plan.block_size * plan.block_size, lookback, window)
    needed = [(max(first, first_kept), start)]
    # Otherwise the anchor is in the first part: another rank's first block is whole.
    if first > 0:
        needed.append((first_kept, plan.anchor_size))
    return sorted(
        Transfer(source=source, target=owner, start=a, stop=b)
        for source, segments in enumerate(layout)
        if source != owner
        for run in needed
        for a, b in segments.within(*run)
    )
