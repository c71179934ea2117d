"""Estimates of both phases on hardware that may not be available, over any number of ranks.

Operations, bytes and collectives are those that `cost` and `traffic` count; here they are divided
by rates. A rate is what a device sustains on such work, not the figure on its data sheet; benchmark
results calibrate it (`hardware.calibrate`). Standard library only.

Schemes:
    star: this library; the anchor is computed once and broadcast.
    star-local: this library; every rank computes the anchor again.
    official: the paper's implementation; the anchor is computed again for every block.
    ring: exact attention, zigzag layout, which balances the ranks.
    ring-plain: exact attention, contiguous layout as in the paper; each round waits for the rank
        whose queries come after all of its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from star_attention.errors import InvalidInputError, quote
from star_attention.planning import cost, rounds, traffic
from star_attention.planning.hardware import Hardware
from star_attention.planning.helping import Help, helps_of_shape
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import BlockPlan, without_lookback
from star_attention.planning.steps import Mesh, token_seconds
from star_attention.planning.stored import stored_bytes
from star_attention.planning.windows import LAST

SCHEMES = ("star", "star-local", "official", "ring", "ring-plain")
# Schemes in which every rank computes the anchor, so that phase 1 needs no communication.
_WITHOUT_BROADCAST = ("star-local", "official")
_SMALLEST_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of one scheme.

    Attributes:
        scheme: one of `SCHEMES`.
        ranks: number of context-parallel ranks.
        tensor_parallel: devices of each.
        context: tokens of the context.
        block: tokens of a block, None for ring attention.
        compute_s: seconds until the last rank has computed in phase 1; ranks after the first wait
            for an anchor of several forwards.
        wire_s: seconds that communication takes in phase 1.
        exposed_s: the part of `wire_s` that does not overlap computation.
        token_s: seconds per token of an answer, if every device reads all weights that it holds.
        sliced_token_s: the same with weights in slices (`slice_weights`); None on one rank.
        memory: bytes on the fullest rank (weights, keys and values, anchor, working memory).
        fits: True if a device has that much memory.
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
    tensor_parallel: int = 1
    sliced_token_s: float | None = None

    @property
    def encode_s(self) -> float:
        """Seconds of phase 1."""
        return self.compute_s + self.exposed_s


def estimate(
    shape: ModelShape,
    on: Hardware,
    scheme: str,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    kv_dtype: str | None = None,
    kv_windows: str = LAST,
    balance_ranks: bool = True,
    tensor_parallel: int = 1,
) -> Estimate:
    """Estimate one scheme.

    Args:
        shape: the model.
        on: the device and its link.
        scheme: one of `SCHEMES`.
        plan: context, blocks and ranks; ring takes its context and ranks alone, and official the
            paper's blocks, which do not look back.
        tokens_per_forward: most tokens of a forward.
        kv_dtype: as in `StarConfig`; `kv_windows` and `balance_ranks` likewise.
        tensor_parallel: devices of each rank, which share the weights.

    Raises:
        InvalidInputError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise InvalidInputError(
            f"scheme {quote(scheme)} is unknown; choose one of {', '.join(SCHEMES)}"
        )
    is_ring, helps = scheme.startswith("ring"), list[Help]()
    on = on.with_fp8(shape.quantized_share)
    context, ranks = plan.context_tokens, plan.ranks
    if is_ring:
        plan = BlockPlan.dense(context, ranks)
        compute_s, wire_s, exposed_s = _ring(shape, on, scheme, plan, tokens_per_forward)
        stored = BlockPlan.dense(-(-context // ranks))
    else:
        if scheme == "official":
            plan = without_lookback(plan)
        if balance_ranks and scheme not in _WITHOUT_BROADCAST:
            helps = helps_of_shape(shape, plan, tokens_per_forward=tokens_per_forward)
        compute_s, wire_s, exposed_s = _blocks(shape, on, scheme, plan, tokens_per_forward, helps)
        stored = plan
    if tensor_parallel > 1:
        sums_s = _sums_s(shape, on, plan, tokens_per_forward, tensor_parallel)
        compute_s, exposed_s = compute_s / tensor_parallel, exposed_s + sums_s
        wire_s += sums_s
    memory = max(
        cost.memory_per_rank(
            shape,
            stored,
            tokens_per_forward=tokens_per_forward,
            kv_dtype=kv_dtype,
            kv_windows=kv_windows,
            rank=rank,
            tensor_parallel=tensor_parallel,
            helps=helps,
        ).total
        for rank in _candidate_ranks(stored)
    )
    kv_bytes = max(
        stored_bytes(shape, stored, rank, kv_dtype, kv_windows) for rank in _candidate_ranks(stored)
    )
    kv_bytes //= tensor_parallel
    whole = Mesh(ranks=ranks, tensor_parallel=tensor_parallel)
    sliced = None
    if ranks > 1 and tensor_parallel == 1:
        sliced = token_seconds(shape, on, replace(whole, sliced=True), kv_bytes)
    return Estimate(
        scheme=scheme,
        ranks=ranks,
        context=context,
        block=None if is_ring else min(plan.block_size, context),
        compute_s=compute_s,
        wire_s=wire_s,
        exposed_s=exposed_s,
        token_s=token_seconds(shape, on, whole, kv_bytes),
        sliced_token_s=sliced,
        memory=memory,
        fits=memory <= on.memory,
        tensor_parallel=tensor_parallel,
    )


def best_block(
    shape: ModelShape,
    on: Hardware,
    plan_of: Callable[[int], BlockPlan],
    *,
    smallest: int,
    tokens_per_forward: int,
    balance_ranks: bool = True,
) -> Estimate:
    """Estimate `star` with its fastest block size.

    Args:
        shape: the model.
        on: the device and its link.
        plan_of: returns the plan of a context with blocks of a size.
        smallest: smallest block that is accurate enough; only powers of two from there are tried.
        tokens_per_forward: most tokens of a forward.
        balance_ranks: as in `StarConfig`.
    """
    context = plan_of(smallest).context_tokens
    least = min(smallest, context)
    sizes = [size for size in _powers(_SMALLEST_BLOCK, context) if size >= least] or [context]
    estimates = (
        estimate(
            shape,
            on,
            "star",
            plan_of(size),
            tokens_per_forward=tokens_per_forward,
            balance_ranks=balance_ranks,
        )
        for size in sizes
    )
    return min(estimates, key=lambda candidate: candidate.encode_s)


def _blocks(
    shape: ModelShape,
    on: Hardware,
    scheme: str,
    plan: BlockPlan,
    tokens_per_forward: int,
    helps: list[Help],
) -> tuple[float, float, float]:
    """Return compute, wire and exposed seconds of phase 1 for sharded blocks."""
    if plan.stripes is not None and plan.busy_ranks > 1:
        return _stripes(shape, on, scheme, plan, tokens_per_forward)
    ranks_s = {
        rank: _rank_seconds(shape, on, scheme, plan, rank, tokens_per_forward, helps)
        for rank in _candidate_ranks(plan)
    }
    busiest = max(ranks_s.values(), default=0.0)
    if scheme in _WITHOUT_BROADCAST or plan.busy_ranks < 2 or not plan.anchor_size:
        return busiest, 0.0, 0.0
    # A layer's part of the anchor arrives while the other ranks compute that layer of their first
    # block.
    wire_s = plan.anchor_size * shape.kv_bytes_per_token / on.link + shape.kv_layers * on.latency
    first = cost.phase1(
        shape, BlockPlan.dense(plan.block_size), tokens_per_forward=tokens_per_forward
    )
    late_s = _anchor_late_s(shape, on, plan, tokens_per_forward)
    last_s = max(seconds + (late_s if rank else 0.0) for rank, seconds in ranks_s.items())
    return last_s, wire_s, max(0.0, wire_s - on.seconds(first))


def _stripes(
    shape: ModelShape, on: Hardware, scheme: str, plan: BlockPlan, tokens_per_forward: int
) -> tuple[float, float, float]:
    """Return compute, wire and exposed seconds of phase 1 where ranks look back to each other."""
    sends_anchor = scheme not in _WITHOUT_BROADCAST and plan.anchor_size > 0
    spent = rounds.times(shape, on, plan, sends_anchor=sends_anchor)
    again_s = 0.0
    if scheme == "star-local" and plan.anchor_size:
        # Rank 0 waits for the others.
        anchor = BlockPlan.dense(plan.anchor_size)
        again_s = on.seconds(cost.phase1(shape, anchor, tokens_per_forward=tokens_per_forward))
    return spent.compute_s + again_s, spent.wire_s, spent.exposed_s


def _anchor_late_s(
    shape: ModelShape, on: Hardware, plan: BlockPlan, tokens_per_forward: int
) -> float:
    """Return the seconds for which other ranks wait for an anchor of several forwards.

    Their first forward needs all of it, and rank 0 is then in the last of these forwards.
    """
    before = max(
        span.start
        for span in plan.spans(tokens_per_forward, rank=0)
        if span.start < plan.anchor_size
    )
    if not before:
        return 0.0
    forwards = BlockPlan.dense(before)
    return on.seconds(cost.phase1(shape, forwards, tokens_per_forward=tokens_per_forward))


def _rank_seconds(
    shape: ModelShape,
    on: Hardware,
    scheme: str,
    plan: BlockPlan,
    rank: int,
    tokens_per_forward: int,
    helps: list[Help],
) -> float:
    """Return the seconds that one rank computes in phase 1."""
    own = cost.phase1(shape, plan, tokens_per_forward=tokens_per_forward, rank=rank, helps=helps)
    anchor = cost.phase1(
        shape, BlockPlan.dense(max(1, plan.anchor_size)), tokens_per_forward=tokens_per_forward
    )
    extra_anchors = 0
    if scheme == "official":
        extra_anchors = sum(start > 0 for start, _ in plan.rank_blocks(rank))
    elif scheme == "star-local" and rank > 0:
        extra_anchors = 1
    return on.seconds(own) + extra_anchors * (on.seconds(anchor) if plan.anchor_size else 0.0)


def _ring(
    shape: ModelShape, on: Hardware, scheme: str, plan: BlockPlan, tokens_per_forward: int
) -> tuple[float, float, float]:
    """Return compute, wire and exposed seconds of phase 1 for ring attention."""
    ranks, tokens = plan.ranks, plan.context_tokens
    whole = cost.phase1(shape, BlockPlan.dense(tokens), tokens_per_forward=tokens_per_forward)
    linear_s = (whole.linear + whole.expansion) / on.matrix / ranks
    attention_s = whole.attention / on.attention / ranks
    if scheme == "ring-plain" and ranks > 1:
        # In every round some rank has keys that all its queries see. Only in the first round are
        # the keys its own, of which its queries see half.
        shard = tokens / ranks
        pairs = shard * shard * (ranks - 0.5)
        attention_s = sum(call.flops_per_pair for call in shape.attention) * pairs / on.attention
    if ranks == 1:
        return linear_s + attention_s, 0.0, 0.0
    rounds = ranks - 1
    wire_s = rounds * (
        tokens / ranks * shape.kv_bytes_per_token / on.link + shape.kv_layers * on.latency
    )
    return linear_s + attention_s, wire_s, max(0.0, wire_s - attention_s)


def _sums_s(
    shape: ModelShape,
    on: Hardware,
    plan: BlockPlan,
    tokens_per_forward: int,
    tensor_parallel: int,
) -> float:
    """Return the seconds of the sums after attention and MLP of the rank with the most tokens."""
    tokens = max(plan.rank_tokens(rank) for rank in _candidate_ranks(plan))
    sums = traffic.phase1_tp(
        shape,
        BlockPlan.dense(tokens),
        tokens_per_forward=tokens_per_forward,
        tensor_parallel=tensor_parallel,
    )
    return sums.bytes / tensor_parallel / on.link + sums.calls * on.latency


def _candidate_ranks(plan: BlockPlan) -> list[int]:
    """Return ranks that include the busiest: those in between all do the same work."""
    last = plan.busy_ranks - 1
    return sorted({rank for rank in (0, 1, last - 1, last) if 0 <= rank <= last})


def _powers(start: int, stop: int) -> Iterable[int]:
    size = start
    while size <= stop:
        yield size
        size *= 2
