"""What rank 0 computes for other ranks in phase 1, in integers.

Rank 0's first block has no anchor to attend to, so rank 0 would end first. It computes the first
layers of other ranks' last blocks meanwhile, and sends their keys and values, and the hidden states
from which the others go on. Which rank keeps which token does not change. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import ANCHOR_SOURCES, LINEAR_PAIRS, BlockPlan, Span

_LEAST_GAIN = 0.005
"""Least share of the busiest rank's work that is worth the transfers."""


@dataclass(frozen=True, kw_only=True)
class Help:
    """The first layers of a run of blocks, which rank 0 computes for another rank.

    Attributes:
        rank: the context-parallel rank that the blocks belong to.
        start: first token of the run.
        stop: one after its last token.
        layers: layers that rank 0 computes; `rank` computes the others.
    """

    rank: int
    start: int
    stop: int
    layers: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    def spans(self, plan: BlockPlan, tokens_per_forward: int) -> list[Span]:
        """Return the run's forwards; they are among those of `plan.spans`."""
        return list(plan.spans(tokens_per_forward, run=(self.start, self.stop)))


def helps(plan: BlockPlan, *, layers: int, tokens_per_forward: int) -> list[Help]:
    """Return what rank 0 computes for other ranks, in the order in which it does.

    The busiest ranks are helped, by a layer more at a time, as long as rank 0 has less to do than
    they have, and is ready before they come to the run that it begins.

    Args:
        plan: the blocks.
        layers: the model's layers, which are assumed to be alike.
        tokens_per_forward: most tokens of a forward.
    """
    if plan.busy_ranks < 2 or plan.stripes is not None or not plan.anchor_size:
        return []
    spans = [list(plan.spans(tokens_per_forward, rank=rank)) for rank in range(plan.busy_ranks)]
    runs = [None, *(_last_run(own) for own in spans[1:])]
    # Work of a layer in pairs, times the number of layers.
    loads = [layers * sum(_pairs(plan, span) for span in own) for own in spans]
    anchor = [_pairs(plan, span) for span in spans[0] if span.start < plan.anchor_size]
    # Others wait for an anchor of several forwards until rank 0 is in the last of these.
    loads[1:] = [load + layers * sum(anchor[:-1]) for load in loads[1:]]
    before, ready = max(loads), layers * sum(anchor)
    given = [0] * len(spans)
    while True:
        busiest = [rank for rank, load in enumerate(loads) if load == max(loads)]
        units = {}
        for rank in busiest:
            run = runs[rank]
            if run is None or given[rank] + 1 == layers:
                break
            units[rank] = sum(_pairs(plan, span) for span in run)
        more = sum(units.values())
        if len(units) < len(busiest) or loads[0] + more >= max(loads):
            break
        # A rank comes to its run when all that it does by itself is left of this alone.
        if any(
            ready + more > loads[rank] - (layers - given[rank]) * unit
            for rank, unit in units.items()
        ):
            break
        ready += more
        loads[0] += more
        for rank, unit in units.items():
            loads[rank] -= unit
            given[rank] += 1
    if max(loads) > (1 - _LEAST_GAIN) * before:
        return []
    return [
        Help(rank=rank, start=run[0].start, stop=run[-1].stop, layers=given[rank])
        for rank, run in enumerate(runs)
        if run is not None and given[rank]
    ]


def helps_of_shape(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    anchor_source: str = ANCHOR_SOURCES[0],
    balance_ranks: bool = True,
) -> list[Help]:
    """Return `helps` for a model; none where each rank computes the anchor by itself.

    `anchor_source` and `balance_ranks` are those of `StarConfig`.

    Layers with a window, or without keys of their own, or that store compressed ones, take too
    different times.
    """
    alike = (
        len(shape.attention) == shape.layers == shape.kv_layers
        and all(call.window is None for call in shape.attention)
        and not shape.expansion_parameters
    )
    if not (alike and balance_ranks) or anchor_source != ANCHOR_SOURCES[0]:
        return []
    return helps(plan, layers=shape.layers, tokens_per_forward=tokens_per_forward)


def helped_bytes(
    shape: ModelShape, given: Sequence[Help], rank: int, tensor_parallel: int = 1
) -> int:
    """Return the bytes of what rank 0 computes for others that are on a rank at a time, at most.

    On rank 0 they are what the blocks' later forwards read, and what is on its way; on the other
    rank what has arrived and is not yet stored.
    """

    def keys(each: Help) -> int:
        layers = each.tokens * shape.kv_bytes_per_token * each.layers // shape.layers
        return layers // tensor_parallel

    def hidden(each: Help) -> int:
        return each.tokens * shape.hidden_size * shape.bytes_per_element

    if rank == 0:
        return sum(keys(each) + hidden(each) for each in given) + max(map(keys, given), default=0)
    return sum(keys(each) + hidden(each) for each in given if each.rank == rank)


def in_order(spans: Sequence[Span], run: Sequence[Span]) -> Iterator[Span]:
    """Yield a rank's forwards: those of the run that rank 0 begins for it are the last ones."""
    yield from (span for span in spans if span not in run)
    yield from run


def _last_run(spans: list[Span]) -> list[Span] | None:
    """Return the last of a rank's longest runs of blocks, but not its first run; None without one.

    A run is a forward, or all forwards of a block.
    """
    runs: list[list[Span]] = []
    for span in spans:
        if runs and runs[-1][0].block_start == span.block_start:
            runs[-1].append(span)
        else:
            runs.append([span])
    later = [run for run in runs[1:] if run[0].start == run[0].block_start]
    return max(reversed(later), key=lambda run: run[-1].stop - run[0].start, default=None)


def _pairs(plan: BlockPlan, span: Span) -> int:
    """Return the work of a layer for a forward, in pairs of a query and a key."""
    first = span.start - span.block_start
    # The mean number of keys that a token sees in its block.
    own = first + (min(span.tokens, plan.block_size) + 1) // 2
    anchor = plan.anchor_size if span.block_start else 0
    if not span.block_start and span.tokens > plan.block_size:
        anchor = plan.anchor_size * (span.tokens - plan.block_size) // span.tokens
    return span.tokens * (LINEAR_PAIRS + own + anchor)
