"""The time of phase 1 where blocks look back across ranks: rounds of stripes, in step.

In a round each rank encodes a stripe. Layer by layer it waits for what other ranks send, which
arrives while it attends inside its own blocks. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from star_attention.planning import cost, exchange
from star_attention.planning.exchange import LayerKind, Transfer
from star_attention.planning.hardware import Hardware
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.pairs import blocks_of, causal_pairs
from star_attention.planning.plan import BlockPlan


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """Seconds of all rounds together.

    Attributes:
        compute_s: computation of the busiest rank of each round.
        wire_s: the exchanges of all layers, each as long as that of its busiest rank.
        exposed_s: the part of `wire_s` for which a rank has nothing to compute.
    """

    compute_s: float
    wire_s: float
    exposed_s: float


def times(shape: ModelShape, on: Hardware, plan: BlockPlan, *, sends_anchor: bool) -> RoundTimes:
    """Estimate the rounds of a plan with stripes.

    Args:
        shape: the model.
        on: the device and its link.
        plan: the blocks, in stripes.
        sends_anchor: True if the anchor comes with the first round.
    """
    stripes = plan.stripes
    assert stripes is not None
    compute_s = wire_s = exposed_s = 0.0
    kinds = exchange.layer_kinds(shape, plan)
    for number in range(stripes.rounds):
        runs = stripes.of_round(number)
        compute_s += max(
            on.seconds(cost.phase1_runs(shape, plan, [run], tokens_per_forward=stripes.longest))
            for run in runs
        )
        for kind, layers in kinds.items():
            transfers = exchange.in_round(
                plan, number, kind.lookback, kind.call.window, anchor=sends_anchor
            )
            spent_s = {
                rank: size * kind.token_bytes / on.link + on.latency
                for rank, size in _busiest_direction(transfers).items()
            }
            hidden_s = [
                0.0 if shape.expansion_parameters else _own_flops(plan, kind, run) / on.attention
                for run in runs
            ]
            wire_s += layers * max(spent_s.values(), default=0.0)
            exposed_s += layers * max(
                max(0.0, spent_s.get(rank, 0.0) - own_s) for rank, own_s in enumerate(hidden_s)
            )
    return RoundTimes(compute_s=compute_s, wire_s=wire_s, exposed_s=exposed_s)


def _busiest_direction(transfers: Sequence[Transfer]) -> dict[int, int]:
    """Return the tokens of each rank that sends or receives, in the direction that has more."""
    sent, received = Counter[int](), Counter[int]()
    for transfer in transfers:
        sent[transfer.source] += transfer.tokens
        received[transfer.target] += transfer.tokens
    return {rank: max(sent[rank], received[rank]) for rank in sent | received}


def _own_flops(plan: BlockPlan, kind: LayerKind, run: tuple[int, int]) -> int:
    """Count the operations of a layer's attention inside the blocks of a stripe.

    Several blocks that see everything before them have none: they wait for all keys.
    """
    # A short last block is a forward of its own, after the one that others look back to.
    span = next(plan.spans(plan.context_tokens, run=run))
    if span.tokens > plan.block_size and span.stop <= (kind.lookback + 1) * plan.block_size:
        return 0
    pairs = sum(
        causal_pairs(stop - start, kind.call.window)
        for start, stop in blocks_of(plan, [(span.start, span.stop)])
    )
    return pairs * kind.call.flops_per_pair
