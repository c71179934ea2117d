"""What a context would take on hardware that is not there: a cost model of both phases over any number of ranks.

Operations, bytes and collectives are those that `cost` and `wire` count; here they are divided by rates. Rates are what a device
sustains on such work, not what its data sheet promises; a benchmark's results calibrate them (`calibrated`). Standard library only.

Schemes: `star` (this library: the anchor computed once and sent), `star-local` (once more on each rank), `official` (the paper's
implementation: once more for each block), `ring` (exact, zig-zag: balanced) and `ring-plain` (exact, contiguous, as in the paper:
each round waits for the rank whose keys all precede its queries).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.planning import cost, traffic
from star_attention.planning.cost import Flops, ModelShape
from star_attention.planning.plan import BlockPlan

SCHEMES = ("star", "star-local", "official", "ring", "ring-plain")
_SMALLEST_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and its link to the others.

    matrix, attention: operations a second of linear layers and of attention. bandwidth: bytes a second of its memory, which holds
    `memory` bytes. link: payload bytes a second that it sends and receives at once. latency: seconds of a collective or a message.
    """

    name: str
    matrix: float
    attention: float
    bandwidth: float
    memory: float
    link: float
    latency: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:
                raise InvalidInputError(f"hardware {field.name} {value!r} is not above 0")


HARDWARE = {
    known.name: known
    for known in (
        # An H200's rates were seen with this library (bench/results); links are four fifths of their nominal rates: NVLink 4 has
        # 450 GB/s each way, one 400 Gbit/s adapter a device 50 GB/s, NVLink 3 has 300 GB/s, 10 Gbit/s Ethernet 1.25 GB/s.
        Hardware(
            name="h200-nvlink",
            matrix=720e12,
            attention=600e12,
            bandwidth=4.3e12,
            memory=141e9,
            link=360e9,
            latency=15e-6,
        ),
        Hardware(
            name="h200-ib",
            matrix=720e12,
            attention=600e12,
            bandwidth=4.3e12,
            memory=141e9,
            link=40e9,
            latency=30e-6,
        ),
        Hardware(
            name="a100-nvlink",
            matrix=240e12,
            attention=190e12,
            bandwidth=1.7e12,
            memory=80e9,
            link=240e9,
            latency=20e-6,
        ),
        Hardware(
            name="cpu-ethernet",
            matrix=1e12,
            attention=0.5e12,
            bandwidth=1e11,
            memory=256e9,
            link=1e9,
            latency=100e-6,
        ),
    )
}


def hardware(text: str) -> Hardware:
    """A known name, numbers (`matrix=7e14,link=4e10,...`), or a name with numbers that replace some of its own.

    Raises `InvalidInputError` for an unknown name or number, and where numbers alone leave something out.
    """
    name, *numbers = [part.strip() for part in text.split(",")]
    if "=" in name:
        name, numbers = "", [name, *numbers]
    elif name not in HARDWARE:
        raise InvalidInputError(
            f"hardware {name!r} is unknown; choose one of {', '.join(HARDWARE)}, or give numbers"
        )
    known = [field.name for field in fields(Hardware) if field.name != "name"]
    given: dict[str, float] = {}
    for number in numbers:
        field, equals, value = number.partition("=")
        if field not in known or not equals:
            raise InvalidInputError(f"hardware {number!r} is unknown; give {'=, '.join(known)}=")
        try:
            given[field] = float(value)
        except ValueError:
            raise InvalidInputError(f"hardware {field} {value!r} is no number") from None
    if name:
        return replace(HARDWARE[name], **given, name=text) if given else HARDWARE[name]
    missing = [field for field in known if field not in given]
    if missing:
        raise InvalidInputError(
            f"hardware {text!r} leaves out {', '.join(missing)}; give these too, or a name first"
        )
    return Hardware(name=text, **given)


def calibrated(
    base: Hardware, samples: Sequence[tuple[Flops, float]], bandwidth: float
) -> Hardware:
    """The same with the rates of measured seconds (`fitted`), and a measured bandwidth."""
    matrix, attention = fitted(samples)
    return replace(
        base,
        matrix=matrix,
        attention=attention,
        bandwidth=bandwidth,
        name=f"{base.name}, calibrated",
    )


def fitted(samples: Sequence[tuple[Flops, float]]) -> tuple[float, float]:
    """Rates of linear layers and of attention for which `linear / rate + attention / rate` fits measured seconds best (least
    squares of the relative errors).

    Raises `InvalidInputError` where the samples do not tell the two rates apart.
    """
    # Unknown: seconds an operation, x of linear layers and y of attention; each row is scaled to a result of 1.
    rows = [(flops.linear / seconds, flops.attention / seconds) for flops, seconds in samples]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    x, y = (a1 * bb - b1 * ab, b1 * aa - a1 * ab) if determinant > 1e-9 * aa * bb else (0.0, 0.0)
    if not (x > 0 and y > 0):
        raise InvalidInputError(
            "these measurements do not tell the rates of linear layers and attention apart; measure dense attention at two"
            " lengths or more"
        )
    return determinant / x, determinant / y


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One scheme. compute_s: of the busiest rank in phase 1. wire_s: what its messages take by themselves; exposed_s: what of
    that does not hide behind work. encode_s: phase 1. token_s: one token of an answer. memory: bytes on the fullest rank
    (weights, keys and values, the anchor, working memory). fits: whether a device holds that.
    """

    scheme: str
    ranks: int
    context: int
    block: int | None
    compute_s: float
    wire_s: float
    exposed_s: float
    token_s: float
    memory: int
    fits: bool

    @property
    def encode_s(self) -> float:
        return self.compute_s + self.exposed_s


def estimate(
    shape: ModelShape,
    on: Hardware,
    scheme: str,
    *,
    context: int,
    ranks: int,
    block: int | None,
    tokens_per_forward: int,
    kv_dtype: str | None = None,
) -> Estimate:
    """One scheme over `ranks` devices; `block` (with an anchor as large) is for star and official, `kv_dtype` as in `StarLLM`."""
    if scheme not in SCHEMES:
        raise InvalidInputError(f"scheme {scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")
    ring = scheme.startswith("ring")
    plan = (
        BlockPlan.dense(context, ranks) if ring else BlockPlan.resolve(context, block, None, ranks)
    )
    compute_s, wire_s, exposed_s = (_ring if ring else _blocks)(
        shape, on, scheme, plan, tokens_per_forward
    )
    share = -(-context // ranks) if ring else _most_tokens(plan)
    kept = BlockPlan.dense(share) if ring else plan
    forwards: dict[str, Any] = dict(tokens_per_forward=tokens_per_forward, kv_dtype=kv_dtype)
    memories = (cost.memory(shape, kept, **forwards, rank=rank) for rank in _telling_ranks(kept))
    memory = max(memory.total for memory in memories)
    return Estimate(
        scheme=scheme,
        ranks=ranks,
        context=context,
        block=None if ring else plan.block_size,
        compute_s=compute_s,
        wire_s=wire_s,
        exposed_s=exposed_s,
        token_s=_token_s(shape, on, share * shape.kept_bytes_per_token(kv_dtype), ranks),
        memory=memory,
        fits=memory <= on.memory,
    )


def best_block(
    shape: ModelShape,
    on: Hardware,
    *,
    context: int,
    ranks: int,
    smallest: int,
    tokens_per_forward: int,
) -> Estimate:
    """Star Attention with the power of two that is quickest among blocks of `smallest` tokens or more (what accuracy allows)."""
    sizes = [
        size for size in _powers(_SMALLEST_BLOCK, context) if size >= min(smallest, context)
    ] or [context]
    return min(
        (
            estimate(
                shape,
                on,
                "star",
                context=context,
                ranks=ranks,
                block=size,
                tokens_per_forward=tokens_per_forward,
            )
            for size in sizes
        ),
        key=lambda one: one.encode_s,
    )


def _seconds(on: Hardware, flops: Flops) -> float:
    return (
        flops.linear + flops.expansion + flops.head
    ) / on.matrix + flops.attention / on.attention


def _blocks(
    shape: ModelShape, on: Hardware, scheme: str, plan: BlockPlan, tokens_per_forward: int
) -> tuple[float, float, float]:
    """Compute, wire and exposed seconds of phase 1 where blocks are shared out."""
    busiest = max(
        (
            _rank_seconds(shape, on, scheme, plan, rank, tokens_per_forward)
            for rank in _telling_ranks(plan)
        ),
        default=0.0,
    )
    if scheme != "star" or plan.busy_ranks < 2 or not plan.anchor_size:
        return busiest, 0.0, 0.0
    # Each layer's share of the anchor arrives while the other ranks compute that layer of their first block.
    wire_s = plan.anchor_size * shape.kv_bytes_per_token / on.link + shape.kv_layers * on.latency
    first = cost.phase1(
        shape, BlockPlan.dense(plan.block_size), tokens_per_forward=tokens_per_forward
    )
    return busiest, wire_s, max(0.0, wire_s - _seconds(on, first))


def _rank_seconds(
    shape: ModelShape,
    on: Hardware,
    scheme: str,
    plan: BlockPlan,
    rank: int,
    tokens_per_forward: int,
) -> float:
    own = cost.phase1(shape, plan, tokens_per_forward=tokens_per_forward, rank=rank)
    anchor = cost.phase1(
        shape, BlockPlan.dense(max(1, plan.anchor_size)), tokens_per_forward=tokens_per_forward
    )
    again = 0
    if scheme == "official":
        again = sum(start > 0 for start, _ in plan.rank_blocks(rank))
    elif scheme == "star-local" and rank > 0:
        again = 1
    return _seconds(on, own) + again * (_seconds(on, anchor) if plan.anchor_size else 0.0)


def _ring(
    shape: ModelShape, on: Hardware, scheme: str, plan: BlockPlan, tokens_per_forward: int
) -> tuple[float, float, float]:
    """The same where all keys and values go round."""
    ranks, tokens = plan.ranks, plan.context_tokens
    whole = cost.phase1(shape, BlockPlan.dense(tokens), tokens_per_forward=tokens_per_forward)
    linear_s = (whole.linear + whole.expansion) / on.matrix / ranks
    attention_s = whole.attention / on.attention / ranks
    if scheme == "ring-plain" and ranks > 1:
        # In each round some rank has keys that its queries all see; only in the first one they are its own, half of them seen.
        share = tokens / ranks
        pairs = share * share * (ranks - 0.5)
        attention_s = sum(call.flops_per_pair for call in shape.attention) * pairs / on.attention
    if ranks == 1:
        return linear_s + attention_s, 0.0, 0.0
    rounds = ranks - 1
    wire_s = rounds * (
        tokens / ranks * shape.kv_bytes_per_token / on.link + shape.kv_layers * on.latency
    )
    return linear_s + attention_s, wire_s, max(0.0, wire_s - attention_s)


def _token_s(shape: ModelShape, on: Hardware, kept_bytes: int, ranks: int) -> float:
    """Weights, and a rank's keys and values, once; and the merge of each layer."""
    read_s = (shape.weight_bytes + kept_bytes) / on.bandwidth
    merges_s = 0.0
    for call in shape.attention if ranks > 1 else ():
        merge = traffic.merge_traffic(ranks, call.heads, call.v_head_size)
        merges_s += merge.bytes / ranks / on.link + merge.calls * on.latency
    return read_s + merges_s


def _most_tokens(plan: BlockPlan) -> int:
    layout = plan.layout
    return max(layout[rank].tokens for rank in _telling_ranks(plan))


def _telling_ranks(plan: BlockPlan) -> list[int]:
    """Ranks among which the busiest is: runs of blocks differ at both ends only."""
    last = plan.busy_ranks - 1
    return sorted({rank for rank in (0, 1, last - 1, last) if 0 <= rank <= last})


def _powers(start: int, stop: int) -> Iterable[int]:
    size = start
    while size <= stop:
        yield size
        size *= 2
