"""The cost of a plan in floating-point operations and memory, in integers, before any tensor
exists.

A multiply-add counts as two operations. Attention is counted in pairs (`pairs.py`). Elementwise
work (norms, activations, softmax) is left out, because memory bandwidth bounds it, not arithmetic.
Communication is counted in `traffic.py`. Printed by `plan`. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from star_attention.planning import residency
from star_attention.planning.helping import Help, helped_bytes
from star_attention.planning.model_shape import AttentionShape, ModelShape
from star_attention.planning.pairs import (
    Runs,
    answer_pairs,
    blocks_of,
    causal_pairs,
    context_pairs,
    renewed_pairs,
    streaming_pairs,
)
from star_attention.planning.plan import BlockPlan
from star_attention.planning.second_look import chosen_tokens
from star_attention.planning.stored import (
    expanded_bytes,
    recent_bytes,
    stored_bytes,
    working_bytes,
)
from star_attention.planning.windows import LAST

# --------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations by what they are spent on."""

    linear: int = 0
    attention: int = 0
    expansion: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All operations."""
        return self.linear + self.attention + self.expansion + self.head

    def plus(self, other: Flops, times: int, parts: int) -> Flops:
        """Return these operations and `times` of `parts` equal parts of others."""
        return Flops(
            linear=self.linear + other.linear * times // parts,
            attention=self.attention + other.attention * times // parts,
            expansion=self.expansion + other.expansion * times // parts,
            head=self.head + other.head * times // parts,
        )


def phase1(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    rank: int | None = None,
    helps: Sequence[Help] = (),
) -> Flops:
    """Count the operations of encoding a context as this library does.

        linear    = 2 * linear_parameters * tokens
        attention = sum over layers of flops_per_pair * pairs of the law

    Every token goes through the linear layers once, because blocks share the anchor's keys and
    values. MLA expands the keys that each forward reads, so that its cost depends on how the plan
    is cut into forwards. The last layer counts in full, of which the library computes the keys and
    values alone. Source: arXiv 2411.17116, section 2.1 and Algorithm 1.

    Args:
        shape: the model.
        plan: the blocks; `BlockPlan.dense` gives dense attention.
        tokens_per_forward: most tokens of a forward.
        rank: count this context-parallel rank only; None counts all.
        helps: what rank 0 computes for others; all ranks together compute the same.
    """
    own = phase1_runs(shape, plan, _runs(plan, rank), tokens_per_forward=tokens_per_forward)
    for given in helps:
        if rank in (0, given.rank):
            run = [(given.start, given.stop)]
            moved = phase1_runs(shape, plan, run, tokens_per_forward=tokens_per_forward)
            own = own.plus(moved, given.layers if rank == 0 else -given.layers, shape.layers)
    return own


def phase1_runs(
    shape: ModelShape, plan: BlockPlan, runs: Runs, *, tokens_per_forward: int
) -> Flops:
    """Count the operations of `phase1` for some runs of blocks, each of them on one rank."""
    expanded = 0
    if shape.expansion_parameters:
        expanded = sum(_keys_read(shape, plan, tokens_per_forward, run) for run in runs)
    return Flops(
        linear=2 * shape.linear_parameters * sum(stop - start for start, stop in runs),
        attention=sum(
            call.flops_per_pair * pairs for call, pairs in _calls_with_pairs(shape, plan, runs)
        ),
        expansion=2 * shape.expansion_parameters * expanded,
    )


def phase1_official(shape: ModelShape, plan: BlockPlan, rank: int | None = None) -> Flops:
    """Count the operations of encoding a context as the official implementation does.

    It encodes the anchor again before every block but the first:

        tokens = context_tokens + (blocks - 1) * anchor_size
        pairs  = pairs of the law + (blocks - 1) * causal pairs within the anchor

    With anchor = block this is twice the linear work for all but the first block, and a third more
    attention (2 b^2 instead of 1.5 b^2 pairs per block of b tokens). Source: the paper's Algorithm
    1; NVIDIA/Star-Attention at c61059f.

    Args:
        shape: the model.
        plan: the blocks.
        rank: count this context-parallel rank only; None counts all.
    """
    runs = _runs(plan, rank)
    extra = sum(start > 0 for start, _ in blocks_of(plan, runs))
    tokens = sum(stop - start for start, stop in runs) + extra * plan.anchor_size
    return Flops(
        linear=2 * shape.linear_parameters * tokens,
        attention=sum(
            call.flops_per_pair * (pairs + extra * causal_pairs(plan.anchor_size, call.window))
            for call, pairs in _calls_with_pairs(shape, plan, runs)
        ),
        expansion=2 * shape.expansion_parameters * tokens,
    )


def phase1_ring(shape: ModelShape, segments: Iterable[tuple[int, int]]) -> Flops:
    """Count the operations of ring attention on a rank with the queries of these runs of tokens.

    Each query attends to all keys before it, on whatever rank they are. MLA's expansion is not
    counted.
    """
    runs = list(segments)
    return Flops(
        linear=2 * shape.linear_parameters * sum(stop - start for start, stop in runs),
        attention=sum(
            call.flops_per_pair
            * sum(answer_pairs(start, stop - start, call.window) for start, stop in runs)
            for call in shape.attention
        ),
    )


def phase1_streaming(shape: ModelShape, plan: BlockPlan) -> Flops:
    """Count the operations of StreamingLLM's phase 1, which are linear in the context.

    MLA's expansion is not counted.
    """
    return Flops(
        linear=2 * shape.linear_parameters * plan.context_tokens,
        attention=sum(
            call.flops_per_pair * streaming_pairs(plan, call.window) for call in shape.attention
        ),
    )


def phase2(
    shape: ModelShape,
    context_tokens: int,
    *,
    query_tokens: int,
    answer_tokens: int,
    queries: int = 1,
) -> Flops:
    """Count the operations of answering `queries` queries; they are the same for every method.

    The last answer token is never fed back, and the head runs for answer tokens only. Where a
    forward has few tokens, MLA attends to compressed keys: its weights multiply each query and each
    output instead of every key, and a key that the model expands by itself. Source: arXiv
    2411.17116, section 2.2 and Algorithm 2.

    Args:
        shape: the model.
        context_tokens: length of the context.
        query_tokens: length of each query.
        answer_tokens: length of each answer.
        queries: number of queries.
    """
    steps = max(answer_tokens - 1, 0)
    new_tokens, before = query_tokens + steps, context_tokens + query_tokens
    expanded = attention = 0
    # The query in one forward, and each token of the answer in one.
    for forwards, size, first in ((1, query_tokens, context_tokens), (steps, 1, before)):
        compressed = size <= shape.most_compressed
        keys = forwards * (first + size) + size * forwards * (forwards - 1) // 2
        expanded += forwards * (size + 1) if compressed else keys
        attention += sum(
            (call.flops_per_compressed_pair if compressed else call.flops_per_pair)
            * answer_pairs(first, forwards * size, call.window)
            for call in shape.attention
        )
    return Flops(
        linear=2 * shape.linear_parameters * new_tokens * queries,
        attention=attention * queries,
        expansion=2 * shape.expansion_parameters * expanded * queries,
        head=2 * shape.head_parameters * answer_tokens * queries,
    )


def second_look(
    shape: ModelShape,
    plan: BlockPlan,
    share: float,
    *,
    tokens_per_forward: int,
    query_tokens: int,
    queries: int = 1,
) -> Flops:
    """Count the operations of `queries` second looks, in addition to those of `phase2`.

    Each is a query's forward, of which the scores are computed twice, and forwards of the chosen
    tokens, which attend to all tokens before them where layers look back, and in all layers if none
    does. They are counted as spread evenly over the context.

    Args:
        shape: the model.
        plan: blocks and anchor of the context.
        share: share of its tokens that are computed again.
        tokens_per_forward: most tokens of a forward.
        query_tokens: length of each query.
        queries: number of queries.
    """
    context_tokens = plan.context_tokens
    chosen = chosen_tokens(share, context_tokens)
    if not chosen:
        return Flops()
    # The query's forward measures attention to each key, for which all are expanded.
    query = phase2(shape.expanding, context_tokens, query_tokens=query_tokens, answer_tokens=1)
    attention = scores = 0
    for call, lookback in zip(shape.attention, plan.lookbacks(len(shape.attention)), strict=True):
        if call.window is None:
            sees_all = not plan.lookback or lookback > 0
            pairs = renewed_pairs(plan, chosen / context_tokens, sees_all=sees_all)
        else:
            pairs = chosen * causal_pairs(context_tokens, call.window) // context_tokens
        attention += call.flops_per_pair * pairs
        query_pairs = answer_pairs(context_tokens, query_tokens, call.window)
        scores += 2 * call.heads * call.k_head_size * query_pairs
    forwards = -(-chosen // tokens_per_forward)
    return Flops(
        linear=queries * (query.linear + 2 * shape.linear_parameters * chosen),
        attention=queries * (query.attention + scores + attention),
        expansion=queries
        * (query.expansion + 2 * shape.expansion_parameters * forwards * context_tokens),
    )


def _runs(plan: BlockPlan, rank: int | None) -> Runs:
    """Return the runs of blocks of one rank, or of all."""
    layout = plan.layout
    return [run for own in (layout if rank is None else [layout[rank]]) for run in own]


def _calls_with_pairs(
    shape: ModelShape, plan: BlockPlan, runs: Runs
) -> Iterator[tuple[AttentionShape, int]]:
    """Yield every attention call with its pairs, counted once per window and look-back."""
    calls = list(zip(shape.attention, plan.lookbacks(len(shape.attention)), strict=True))
    pairs = {
        (window, lookback): context_pairs(plan, window, runs, lookback)
        for window, lookback in {(call.window, lookback) for call, lookback in calls}
    }
    for call, lookback in calls:
        yield call, pairs[call.window, lookback]


def _keys_read(
    shape: ModelShape, plan: BlockPlan, tokens_per_forward: int, run: tuple[int, int]
) -> int:
    """Count the keys that a layer reads in the forwards of a run, the mean over layers.

    They are the tokens of its block so far, the blocks that it looks back to, and the anchor.
    """
    calls = list(zip(shape.attention, plan.lookbacks(len(shape.attention)), strict=True))
    keys = 0
    for call, lookback in calls:
        for span in plan.spans(tokens_per_forward, run=run):
            first = plan.first_seen(span.block_start, lookback, call.window)
            keys += span.stop - first + (plan.anchor_size if first else 0)
    return keys // len(calls)


# ------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: weights, or this rank's shard of them.
        kv: keys and values of the device's blocks.
        anchor: a copy of the anchor's keys and values, if the device needs one.
        tail: keys and values of queries and answers.
        working: estimate of the remaining memory of a forward.
        copy: another copy of the keys and values, for a second look.
        host: keys and values stored in host memory instead; not part of `total`.
    """

    weights: int
    kv: int
    anchor: int
    tail: int
    working: int
    copy: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of device memory."""
        return self.weights + self.kv + self.copy + self.anchor + self.tail + self.working


def memory_per_rank(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    tail_tokens: int = 0,
    rank: int = 0,
    tensor_parallel: int = 1,
    kv_dtype: str | None = None,
    kv_device: str | None = None,
    kv_resident: float = 0.0,
    kv_windows: str = LAST,
    looks_twice: bool = False,
    helps: Sequence[Help] = (),
) -> Memory:
    """Estimate the memory of one rank.

    Every context-parallel rank holds all weights; tensor parallelism shards heads and MLP, but
    leaves embeddings and the language-model head whole. Only the last context-parallel rank holds
    the tail. If keys and values are not stored as computed (`kv_dtype`, `kv_device`), every rank
    that holds a block also needs the anchor as computed, and the blocks that it looks back to;
    else only what other ranks hold of both. Beside stores of the last window (`kv_windows`) is the
    window before a forward. KV in host memory takes some on the device.

    Args:
        shape: the model.
        plan: the blocks.
        tokens_per_forward: most tokens of a forward.
        tail_tokens: tokens of queries and answers together.
        rank: context-parallel rank.
        tensor_parallel: number of tensor-parallel ranks.
        kv_dtype, kv_device, kv_resident, kv_windows: as in `StarConfig`.
        looks_twice: True if queries are answered with a second look.
        helps: what rank 0 computes for others.
    """
    tokens = plan.rank_tokens(rank)
    stored = stored_bytes(shape, plan, rank, kv_dtype, kv_windows) // tensor_parallel
    as_computed = kv_dtype is None and kv_device is None
    needs_anchor = tokens > 0 and (rank > 0 if as_computed else plan.num_blocks > 1)
    elsewhere = shape.sharded_bytes - shape.sharded_bytes // tensor_parallel
    longest = max((span.tokens for span in plan.spans(tokens_per_forward, rank=rank)), default=0)
    working = working_bytes(shape, longest, tensor_parallel) + expanded_bytes(shape, tokens)
    recent = recent_bytes(
        shape, plan, tokens_per_forward, rank, as_computed=as_computed, kv_windows=kv_windows
    )
    working += recent // tensor_parallel + helped_bytes(shape, helps, rank, tensor_parallel)
    token_bytes, layers = shape.kv_bytes_per_token, shape.kv_layers
    computed = tokens * token_bytes // tensor_parallel
    whole = tokens * shape.stored_bytes_per_token(kv_dtype) // tensor_parallel
    near, arriving = residency.on_device(stored, whole, computed, layers, kv_device, kv_resident)
    return Memory(
        weights=shape.weight_bytes - elsewhere,
        kv=near,
        anchor=plan.anchor_size * token_bytes // tensor_parallel if needs_anchor else 0,
        tail=tail_tokens * token_bytes // tensor_parallel if rank == plan.ranks - 1 else 0,
        working=working + arriving,
        copy=near if looks_twice else 0,
        host=(stored - near) * (1 + looks_twice),
    )
