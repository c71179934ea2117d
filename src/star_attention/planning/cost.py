"""What a plan costs: floating-point operations and memory, in integers, before any tensor exists.

A multiplication with its addition counts as two operations. Attention is counted by pairs of a query and a key that it
sees, exactly as the law's mask has them (`attention/oracle.py`). Elementwise work (norms, activations, softmax) is left
out: it is bound by memory, not by arithmetic. Standard library only; `hf/shape.py` reads a `ModelShape` off a config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from star_attention.planning import traffic
from star_attention.planning.plan import ANCHOR_SOURCES, BlockPlan
from star_attention.planning.traffic import Traffic

# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention call of a forward (as a rule there is one a layer).

    heads: query heads. kv_heads: heads of the keys and values handed to attention (after MLA's expansion).
    k_head_size, v_head_size: sizes of a key and of a value. window: sliding window in tokens, or None.
    """

    heads: int
    kv_heads: int
    k_head_size: int
    v_head_size: int
    window: int | None = None

    @property
    def flops_per_pair(self) -> int:
        """A score costs `2 * k_head_size` a head, its share of the output `2 * v_head_size`."""
        return 2 * self.heads * (self.k_head_size + self.v_head_size)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the cost of a model depends on.

    attention: every attention call of a forward, in order.
    kv_numbers_per_token: numbers that the context keeps for a token, all layers together: compressed ones for MLA,
        nothing for a layer that reads another layer's keys (KV sharing). kv_rows_per_token: the heads of keys and of values that
        they belong to. kv_layers: layers that keep any.
    linear_parameters: weights that one token is multiplied with in the layers; of a mixture of experts only those of
        the experts that a token goes to.
    cut_parameters: weights of layers that tensor parallelism shares out, 0 where it cannot; summed_numbers_per_token: numbers
        of a token that the ranks of a host then sum, in `sums` collectives a forward.
    expansion_parameters: weights that every *key* is multiplied with whenever it is attended to (MLA's expansion).
    head_parameters: weights of the language-model head.
    parameters: all of them, tied ones once. bytes_per_number: of weights, keys and values.
    """

    name: str
    layers: int
    hidden_size: int
    attention: tuple[AttentionShape, ...]
    kv_numbers_per_token: int
    kv_rows_per_token: int
    kv_layers: int
    linear_parameters: int
    cut_parameters: int = 0
    summed_numbers_per_token: int = 0
    sums: int = 0
    expansion_parameters: int = 0
    head_parameters: int
    parameters: int
    bytes_per_number: int

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_number

    @property
    def kv_bytes_per_token(self) -> int:
        """As they are computed."""
        return self.kv_numbers_per_token * self.bytes_per_number

    def kept_bytes_per_token(self, kv_dtype: str | None) -> int:
        """As they are kept: in fp8 a byte a number, and a scale in fp32 for each row (`store.quantized`)."""
        return (
            self.kv_bytes_per_token
            if kv_dtype is None
            else self.kv_numbers_per_token + 4 * self.kv_rows_per_token
        )


# ---------------------------------------------------------------------------------------------- pairs


def causal_pairs(tokens: int, window: int | None = None) -> int:
    """Pairs (i, j) with `j <= i` and `i - j < window` among `tokens` tokens: `w (w + 1) / 2 + (tokens - w) w`."""
    w = tokens if window is None else min(window, tokens)
    return w * (w + 1) // 2 + (tokens - w) * w


def anchor_pairs(start: int, stop: int, anchor_size: int, window: int | None = None) -> int:
    """Pairs of a token in `start..stop`, which lies behind the anchor, and an anchor token within its window."""
    if window is None:
        return (stop - start) * anchor_size
    # Token i reaches back to i - window + 1. Before `first` it sees the whole anchor, from `end` on nothing of it, and
    # between them one anchor token less with each step.
    first = min(max(start, window - 1), stop)
    end = min(max(first, anchor_size + window - 1), stop)
    most, least = (anchor_size + window - 1 - i for i in (first, end))
    return (first - start) * anchor_size + (most * (most + 1) - least * (least + 1)) // 2


def context_pairs(plan: BlockPlan, window: int | None = None, rank: int | None = None) -> int:
    """Pairs that phase 1 computes, of all ranks or of one: the number of ones in the law's mask over the context."""
    pairs = 0
    for start, stop in plan.blocks if rank is None else plan.rank_blocks(rank):
        pairs += causal_pairs(stop - start, window)
        if start > 0:
            pairs += anchor_pairs(start, stop, plan.anchor_size, window)
    return pairs


def streaming_pairs(plan: BlockPlan, window: int | None = None) -> int:
    """Pairs of StreamingLLM's phase 1: the last `block_size` tokens, and the first `anchor_size` behind them."""
    tokens, near = (
        plan.context_tokens,
        plan.block_size if window is None else min(plan.block_size, window),
    )

    def sinks_beyond(size: int) -> int:
        return causal_pairs(max(0, tokens - size), plan.anchor_size) if plan.anchor_size else 0

    far = sinks_beyond(plan.block_size) if window is None or window > plan.block_size else 0
    return (
        causal_pairs(tokens, near)
        + far
        - (sinks_beyond(window) if far and window is not None else 0)
    )


def answer_pairs(context_tokens: int, new_tokens: int, window: int | None = None) -> int:
    """Pairs that phase 2 computes for `new_tokens` tokens behind the context: each sees all before it."""
    return causal_pairs(context_tokens + new_tokens, window) - causal_pairs(context_tokens, window)


# ---------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations by where they are spent."""

    linear: int = 0
    attention: int = 0
    expansion: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.expansion + self.head


def phase1(
    shape: ModelShape, plan: BlockPlan, *, tokens_per_forward: int, rank: int | None = None
) -> Flops:
    """Encoding a context as this library does it, on all ranks together or on one; `BlockPlan.dense` gives dense attention.

        linear    = 2 * linear_parameters * tokens
        attention = sum over layers of flops_per_pair * pairs of the law

    Every token goes through the linear layers once, because the anchor's keys and values are shared (DESIGN, law 4). MLA
    expands the keys that a forward looks at, so that its cost depends on how the plan is cut into forwards. Source: arXiv
    2411.17116, section 2.1 and Algorithm 1.
    """
    ranks = range(plan.ranks) if rank is None else [rank]
    layout = plan.layout
    tokens = sum(layout[r].tokens for r in ranks)
    expanded = (
        sum(_keys_of_forwards(plan, tokens_per_forward, r) for r in ranks)
        if shape.expansion_parameters
        else 0
    )
    return Flops(
        linear=2 * shape.linear_parameters * tokens,
        attention=sum(call.flops_per_pair * pairs for call, pairs in _each(shape, plan, rank)),
        expansion=2 * shape.expansion_parameters * expanded,
    )


def phase1_official(shape: ModelShape, plan: BlockPlan) -> Flops:
    """The same with the anchor encoded again in front of every block but the first, as the official implementation does.

        tokens = context_tokens + (blocks - 1) * anchor_size
        pairs  = pairs of the law + (blocks - 1) * causal pairs within the anchor

    With anchor = block this is twice the linear work for all but the first block, and a third more attention
    (2 b^2 instead of 1.5 b^2 pairs a block). Source: the paper's Algorithm 1; NVIDIA/Star-Attention at c61059f.
    """
    again = plan.num_blocks - 1
    tokens = plan.context_tokens + again * plan.anchor_size
    return Flops(
        linear=2 * shape.linear_parameters * tokens,
        attention=sum(
            call.flops_per_pair * (pairs + again * causal_pairs(plan.anchor_size, call.window))
            for call, pairs in _each(shape, plan, None)
        ),
        expansion=2 * shape.expansion_parameters * tokens,
    )


def phase1_streaming(shape: ModelShape, plan: BlockPlan) -> Flops:
    """StreamingLLM's phase 1 (`methods.streaming_llm`): a linear cost. What MLA expands is not counted."""
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
    """Answering `queries` queries of `query_tokens` each with `answer_tokens` each; the same for every method.

    The last answer token is never fed back, and the head runs for answer tokens only. MLA expands the whole context at
    every step: once for the query, once for each token after it. Source: arXiv 2411.17116, section 2.2 and Algorithm 2.
    """
    steps = max(answer_tokens - 1, 0)
    new_tokens = query_tokens + steps
    expanded = (steps + 1) * (context_tokens + query_tokens) + steps * (steps + 1) // 2
    return Flops(
        linear=2 * shape.linear_parameters * new_tokens * queries,
        attention=queries
        * sum(
            call.flops_per_pair * answer_pairs(context_tokens, new_tokens, call.window)
            for call in shape.attention
        ),
        expansion=2 * shape.expansion_parameters * expanded * queries,
        head=2 * shape.head_parameters * answer_tokens * queries,
    )


def _each(
    shape: ModelShape, plan: BlockPlan, rank: int | None
) -> Iterator[tuple[AttentionShape, int]]:
    """Every attention call with its pairs, counted once for each window."""
    pairs = {
        window: context_pairs(plan, window, rank)
        for window in {call.window for call in shape.attention}
    }
    for call in shape.attention:
        yield call, pairs[call.window]


def _keys_of_forwards(plan: BlockPlan, tokens_per_forward: int, rank: int) -> int:
    """Keys that all forwards of a rank look at: their own, those of their block before them, and the anchor."""
    return sum(
        span.stop - span.block_start + (plan.anchor_size if span.block_start else 0)
        for span in plan.spans(tokens_per_forward, rank=rank)
    )


# ---------------------------------------------------------------------------------------------- the wire


def phase1_wire(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    anchor_source: str = ANCHOR_SOURCES[0],
    tensor_parallel: int = 1,
) -> Traffic:
    """What hosts exchange while they encode: the anchor's keys and values, from the first to all others that hold a block.

    One broadcast for each layer that keeps keys and each forward of the first host that holds a part of the anchor; with
    tensor parallelism one for each share of the heads.
    """
    if anchor_source == "local" or plan.busy_ranks == 1 or not plan.anchor_size:
        return Traffic()
    shares = sum(span.start < plan.anchor_size for span in plan.spans(tokens_per_forward, rank=0))
    payload = plan.anchor_size * shape.kv_bytes_per_token
    return Traffic(
        shares * shape.kv_layers * tensor_parallel,
        traffic.broadcast_bytes(payload, plan.busy_ranks),
    )


def phase1_wire_within(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    anchor_source: str = ANCHOR_SOURCES[0],
    tensor_parallel: int,
) -> Traffic:
    """What ranks of one host exchange while they encode, of all hosts together: the sums behind attention and MLP."""
    hosts = range(plan.ranks)
    forwards = sum(1 for host in hosts for _ in plan.spans(tokens_per_forward, rank=host))
    tokens = plan.context_tokens
    if anchor_source == "local":
        tokens += (plan.busy_ranks - 1) * plan.anchor_size
        forwards += (plan.busy_ranks - 1) * -(-plan.anchor_size // tokens_per_forward)
    return _sums(shape, tokens, forwards, tensor_parallel)


def _sums(shape: ModelShape, tokens: int, forwards: int, tensor_parallel: int) -> Traffic:
    if tensor_parallel == 1:
        return Traffic()
    payload = tokens * shape.summed_numbers_per_token * shape.bytes_per_number
    return Traffic(forwards * shape.sums, traffic.reduce_bytes(payload, tensor_parallel))


def ring_wire(
    shape: ModelShape, context_tokens: int, ranks: int, tensor_parallel: int = 1
) -> Traffic:
    """What hosts exchange while they encode by ring attention: all keys and values pass by every host, in every attention call."""
    if ranks == 1 or context_tokens < 2 * ranks:
        return Traffic()
    numbers = sum(call.kv_heads * (call.k_head_size + call.v_head_size) for call in shape.attention)
    steps = ranks - 1
    return Traffic(
        steps * len(shape.attention) * tensor_parallel,
        steps * context_tokens * numbers * shape.bytes_per_number,
    )


def phase2_wire(
    shape: ModelShape,
    ranks: int,
    *,
    query_tokens: int,
    answer_tokens: int,
    queries: int = 1,
    tokens_per_forward: int,
    merge_collective: str | None = None,
    tensor_parallel: int = 1,
) -> Traffic:
    """What hosts exchange while they answer `queries` queries one after another: each attention call's states, once a forward.

    The query goes through in forwards of `tokens_per_forward`, then every answer token but the last in one of its own.
    """
    total = Traffic()
    for tokens, times in _answer_forwards(query_tokens, answer_tokens, tokens_per_forward).items():
        times *= queries * tensor_parallel
        for call in shape.attention:
            rows = tokens * call.heads // tensor_parallel
            one = traffic.merge_traffic(ranks, rows, call.v_head_size, merge_collective)
            total.add(one.bytes * times, one.calls * times)
    return total


def phase2_wire_within(
    shape: ModelShape,
    hosts: int,
    *,
    query_tokens: int,
    answer_tokens: int,
    queries: int = 1,
    tokens_per_forward: int,
    tensor_parallel: int,
) -> Traffic:
    """What ranks of one host exchange while they answer, of all hosts together: every host sends all new tokens through."""
    forwards = _answer_forwards(query_tokens, answer_tokens, tokens_per_forward)
    tokens = sum(size * times for size, times in forwards.items())
    return _sums(
        shape, tokens * queries * hosts, sum(forwards.values()) * queries * hosts, tensor_parallel
    )


def _answer_forwards(
    query_tokens: int, answer_tokens: int, tokens_per_forward: int
) -> dict[int, int]:
    """How many forwards of how many tokens one answer takes."""
    whole, rest = divmod(query_tokens, tokens_per_forward)
    forwards = {tokens_per_forward: whole, rest: 1 if rest else 0}
    forwards[1] = forwards.get(1, 0) + max(answer_tokens - 1, 0)
    return forwards


# ---------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    kv: keys and values of its blocks. anchor: the anchor's, on a device that does not hold the first block. tail: those
    of queries and answers. working: an estimate of what a forward needs beside these. host: keys and values in the host's memory
    instead, not part of the total.
    """

    weights: int
    kv: int
    anchor: int
    tail: int
    working: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.anchor + self.tail + self.working


def memory(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    tail_tokens: int = 0,
    rank: int = 0,
    tensor_parallel: int = 1,
    kv_dtype: str | None = None,
    kv_device: str | None = None,
) -> Memory:
    """Bytes on one rank's device; every host holds all weights, only the last one needs the tail (DESIGN, phase 2).

    The ranks of a host share heads, and of the weights those that can be cut; embeddings and head are on each. Where keys and
    values are not kept as they are computed (kv_dtype, kv_device), blocks look at an anchor that is, on each rank with blocks
    behind it; those in the host's memory take none here, but one layer's share of `working`, which answers bring back.
    """
    start, stop = plan.rank_range(rank)
    kept = (stop - start) * shape.kept_bytes_per_token(kv_dtype) // tensor_parallel
    own_anchor = 0 < start < stop or (
        (kv_dtype or kv_device) is not None and plan.num_blocks > 1 and start < stop
    )
    brought = (
        (stop - start) * shape.kv_bytes_per_token // tensor_parallel // max(1, shape.kv_layers)
    )
    tokens = max((span.tokens for span in plan.spans(tokens_per_forward, rank=rank)), default=0)
    share = tensor_parallel
    return Memory(
        weights=shape.weight_bytes
        - (shape.cut_parameters - shape.cut_parameters // share) * shape.bytes_per_number,
        kv=0 if kv_device is not None else kept,
        anchor=plan.anchor_size * shape.kv_bytes_per_token // share if own_anchor else 0,
        tail=tail_tokens * shape.kv_bytes_per_token // share if rank == plan.ranks - 1 else 0,
        working=working_bytes(shape, tokens, share)
        + expanded_bytes(shape, stop - start)
        + (0 if kv_device is None else brought),
        host=0 if kv_device is None else kept,
    )


def working_bytes(shape: ModelShape, tokens: int, tensor_parallel: int = 1) -> int:
    """An estimate of the working memory of a forward of `tokens` tokens; it does not depend on the length of the context.

    Nearly every weight matrix has the hidden size on one side, so `linear_parameters / (layers * hidden_size)` is how many
    numbers a layer's matrices read and write a token beside the hidden states. To these come four hidden states (the
    stream, its norm, a result, a sum) and the fp32 states of attention while they are merged (own block, anchor, result,
    and a temporary).
    """
    widths = -(-shape.linear_parameters // (shape.layers * shape.hidden_size * tensor_parallel))
    states = (
        4
        * 4
        * max((call.heads * call.v_head_size for call in shape.attention), default=0)
        // tensor_parallel
    )
    return tokens * ((widths + 4 * shape.hidden_size) * shape.bytes_per_number + states)


def expanded_bytes(shape: ModelShape, keys: int) -> int:
    """What MLA's expansion of `keys` keys takes in one layer: in phase 2 a query looks at the whole shard at once."""
    if not shape.expansion_parameters:
        return 0
    widest = max(call.kv_heads * (call.k_head_size + call.v_head_size) for call in shape.attention)
    return keys * widest * shape.bytes_per_number
