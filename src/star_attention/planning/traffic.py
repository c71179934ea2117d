"""Communication in integers: which collective merges states, and what each phase sends.

Bytes are the payload received, summed over all ranks, as collectives in a ring or a tree move it: a
broadcast of n bytes delivers them to every other rank, a gather delivers every part to every other
rank, and a reduction moves two parts in `ranks` of its buffer through each rank in each of `ranks -
1` steps. What a transport adds (headers, and the few hundred bytes with which rank 0 leads the
others) is not counted. `cp` is short for context parallel, `tp` for tensor parallel. Standard
library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from star_attention.planning import exchange
from star_attention.planning.helping import helps_of_shape
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import ANCHOR_SOURCES, BlockPlan

FLOAT32_BYTES = 4

ALIGNMENT = 16
"""Elements to which slices of weights are aligned: kernels load them faster."""

CALL_BYTES = 2 * 1024**2
"""Cost of one more collective, as the bytes that could move in that time: 14 us at 150 GB/s."""


@dataclass
class Traffic:
    """Number of collectives, and the bytes that they move.

    Attributes:
        calls: collectives.
        bytes: bytes that they move, summed over all ranks.
    """

    calls: int = 0
    bytes: int = 0

    def add(self, bytes: int, calls: int = 1) -> None:
        """Count more bytes and collectives."""
        self.calls += calls
        self.bytes += bytes

    def plus(self, other: Traffic) -> Traffic:
        """Return the sum of this and other traffic."""
        return Traffic(self.calls + other.calls, self.bytes + other.bytes)

    def since(self, before: Traffic) -> Traffic:
        """Return the traffic added since `before`, an earlier copy of this."""
        return Traffic(self.calls - before.calls, self.bytes - before.bytes)


# -------------------------------------------------------------------------------------- collectives


def broadcast_bytes(payload: int, ranks: int) -> int:
    """Return the bytes of sending `payload` bytes from one rank to all others."""
    return payload * (ranks - 1)


def gather_bytes(part: int, ranks: int) -> int:
    """Return the bytes of sending each rank's `part` bytes to all others."""
    return part * ranks * (ranks - 1)


def reduce_bytes(payload: int, ranks: int) -> int:
    """Return the bytes of a sum or maximum of `payload` bytes, delivered to all ranks."""
    return 2 * payload * (ranks - 1)


def state_bytes(rows: int, head_size: int) -> tuple[int, int]:
    """Return the bytes of a state, output and lse together, and of its lse alone.

    Args:
        rows: batch x queries x heads.
        head_size: elements of an output row.
    """
    return rows * (head_size + 1) * FLOAT32_BYTES, rows * FLOAT32_BYTES


def merge_choice(ranks: int, rows: int, head_size: int) -> str:
    """Choose the collective that merges states: `"gather"` or `"reduce"`.

    Gathering gives every rank all states in one collective; it suits few ranks and short queries.
    Reducing takes two collectives, the maximum of the lse and then a sum, whose bytes per rank do
    not grow with the number of ranks.
    """
    packed, lse = state_bytes(rows, head_size)
    gather = gather_bytes(packed, ranks) // ranks
    reduce = (reduce_bytes(packed, ranks) + reduce_bytes(lse, ranks)) // ranks
    return "gather" if gather <= reduce + CALL_BYTES else "reduce"


def merge_traffic(ranks: int, rows: int, head_size: int, collective: str | None = None) -> Traffic:
    """Count the traffic of merging one layer's states over the ranks.

    Args:
        ranks: context-parallel ranks.
        rows: batch x queries x heads.
        head_size: elements of an output row.
        collective: `"gather"` or `"reduce"`; None for `merge_choice`.
    """
    if ranks == 1:
        return Traffic()
    packed, lse = state_bytes(rows, head_size)
    if (collective or merge_choice(ranks, rows, head_size)) == "gather":
        return Traffic(1, gather_bytes(packed, ranks))
    return Traffic(2, reduce_bytes(packed, ranks) + reduce_bytes(lse, ranks))


def sum_choice(ranks: int, elements: int, bytes_per_element: int) -> str:
    """Choose the collective of a sum: `"gather"` or `"reduce"`.

    Gathering lets every rank add up all parts in fp32. It takes one step instead of two, and is
    exact, but moves more bytes if there are many ranks.
    """
    gather = gather_bytes(elements * bytes_per_element, ranks) // ranks
    return "gather" if gather <= CALL_BYTES else "reduce"


def sum_dtype_bytes(ranks: int, bytes_per_element: int) -> int:
    """Return the bytes of an element in a reduction over cp ranks, which rounds once only."""
    return bytes_per_element if ranks == 2 else max(bytes_per_element, FLOAT32_BYTES)


def sum_traffic(ranks: int, elements: int, bytes_per_element: int) -> Traffic:
    """Count the traffic of a sum of `elements` elements over the cp ranks."""
    if ranks == 1:
        return Traffic()
    if sum_choice(ranks, elements, bytes_per_element) == "gather":
        return Traffic(1, gather_bytes(elements * bytes_per_element, ranks))
    return Traffic(1, reduce_bytes(elements * sum_dtype_bytes(ranks, bytes_per_element), ranks))


# ------------------------------------------------------------------------------------------- phases


def phase1_cp(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    anchor_source: str = ANCHOR_SOURCES[0],
    balance_ranks: bool = True,
    tensor_parallel: int = 1,
) -> Traffic:
    """Count the traffic of phase 1 between context-parallel ranks.

    The first rank broadcasts the anchor's keys and values to all others that hold a block: once per
    layer that stores KV and per forward that contains a part of the anchor, and with tensor
    parallelism once per shard of the heads. Then it sends what it computes for others: keys and
    values of each layer and forward, and hidden states. Where blocks look back, each layer
    exchanges the anchor, and the blocks that others look back to, once per round.
    """
    broadcasts = anchor_source != "local" and plan.busy_ranks > 1 and plan.anchor_size > 0
    if plan.stripes is not None:
        total = Traffic()
        for kind, layers in exchange.layer_kinds(shape, plan).items():
            for number in range(plan.stripes.rounds):
                transfers = exchange.in_round(
                    plan, number, kind.lookback, kind.call.window, anchor=broadcasts
                )
                if transfers:
                    tokens = sum(transfer.tokens for transfer in transfers)
                    total.add(tokens * kind.token_bytes * layers, layers * tensor_parallel)
        return total
    if not broadcasts:
        return Traffic()
    forwards = sum(span.start < plan.anchor_size for span in plan.spans(tokens_per_forward, rank=0))
    payload = plan.anchor_size * shape.kv_bytes_per_token
    total = Traffic(
        forwards * shape.kv_layers * tensor_parallel, broadcast_bytes(payload, plan.busy_ranks)
    )
    helps = helps_of_shape(
        shape, plan, tokens_per_forward=tokens_per_forward, balance_ranks=balance_ranks
    )
    for given in helps:
        forwards = len(given.spans(plan, tokens_per_forward))
        # Every shard has whole hidden states.
        hidden = shape.hidden_size * shape.bytes_per_element * tensor_parallel
        keys = shape.kv_bytes_per_token * given.layers // shape.layers
        calls = forwards * (given.layers + 1) * tensor_parallel
        total.add(given.tokens * (keys + hidden), calls)
    return total


def phase1_tp(
    shape: ModelShape,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    anchor_source: str = ANCHOR_SOURCES[0],
    tensor_parallel: int,
) -> Traffic:
    """Count the traffic of phase 1 between tensor-parallel ranks, summed over the whole mesh.

    These are the all-reduces after attention and MLP.
    """
    forwards = Counter(
        span.stop - span.start
        for rank in range(plan.ranks)
        for span in plan.spans(tokens_per_forward, rank=rank)
    )
    if anchor_source == "local":
        whole, rest = divmod(plan.anchor_size, tokens_per_forward)
        forwards[tokens_per_forward] += (plan.busy_ranks - 1) * whole
        forwards[rest] += plan.busy_ranks - 1
    return _all_reduces(shape, forwards, tensor_parallel)


def ring_cp(
    shape: ModelShape, context_tokens: int, ranks: int, tensor_parallel: int = 1
) -> Traffic:
    """Count the traffic of ring attention's phase 1 between context-parallel ranks.

    In every attention call, all keys and values pass every rank.
    """
    if ranks == 1 or context_tokens < 2 * ranks:
        return Traffic()
    elements = sum(
        call.kv_heads * (call.k_head_size + call.v_head_size) for call in shape.attention
    )
    steps = ranks - 1
    return Traffic(
        steps * len(shape.attention) * tensor_parallel,
        steps * context_tokens * elements * shape.bytes_per_element,
    )


def phase2_cp(
    shape: ModelShape,
    ranks: int,
    *,
    query_tokens: int,
    answer_tokens: int,
    queries: int = 1,
    tokens_per_forward: int,
    merge_collective: str | None = None,
    tensor_parallel: int = 1,
    sliced: Sequence[str] = (),
) -> Traffic:
    """Count the traffic of answering `queries` queries in turn, between context-parallel ranks.

    Each forward merges the states of every attention call. A query takes forwards of
    `tokens_per_forward` tokens, and every answer token but the last takes one of its own.
    `sliced` names the parts of the model whose weights are multiplied in slices.
    """
    total = Traffic()
    for tokens, times in _answer_forwards(query_tokens, answer_tokens, tokens_per_forward).items():
        slices = _slices(shape, ranks, tokens, sliced)
        total.add(slices.bytes * times * queries, slices.calls * times * queries)
        times *= queries * tensor_parallel
        for call in shape.attention:
            rows = tokens * call.heads // tensor_parallel
            merge = merge_traffic(ranks, rows, call.v_head_size, merge_collective)
            total.add(merge.bytes * times, merge.calls * times)
    return total


def _slices(shape: ModelShape, ranks: int, tokens: int, parts: Sequence[str]) -> Traffic:
    """Count the traffic that slices of weights add to a forward of one row: "attention" gathers new
    queries, keys and values, "head" a token's logits, and "attention" and "mlp" sum hidden states.
    """
    total = Traffic()
    if ranks == 1:
        return total
    hidden = sum_traffic(ranks, tokens * shape.hidden_size, shape.bytes_per_element)
    for call in shape.attention if "attention" in parts else ():
        heads = (call.heads + call.kv_heads) * call.k_head_size + call.kv_heads * call.v_head_size
        part = tokens * heads // ranks * shape.bytes_per_element
        total.add(gather_bytes(part, ranks) + hidden.bytes, 1 + hidden.calls)
    if "mlp" in parts:
        total.add(shape.layers * hidden.bytes, shape.layers * hidden.calls)
    if "head" in parts:
        most = padded_share(shape.head_parameters // shape.hidden_size, ranks)
        total.add(gather_bytes(most * shape.bytes_per_element, ranks))
    return total


def padded_share(size: int, ranks: int) -> int:
    """Return the most rows of a vocabulary of `size` that a rank multiplies, to which others pad.

    A multiple of `ALIGNMENT` where that leaves every rank some.
    """
    most = -(-size // ranks)
    return -(-most // ALIGNMENT) * ALIGNMENT if size >= ALIGNMENT * ranks * ranks else most


def phase2_tp(
    shape: ModelShape,
    ranks: int,
    *,
    query_tokens: int,
    answer_tokens: int,
    queries: int = 1,
    tokens_per_forward: int,
    tensor_parallel: int,
) -> Traffic:
    """Count the traffic of answering between tensor-parallel ranks, summed over the whole mesh.

    Each of the `ranks` context-parallel ranks runs all new tokens through its shard of the model.
    """
    forwards = _answer_forwards(query_tokens, answer_tokens, tokens_per_forward)
    repeats = queries * ranks
    return _all_reduces(
        shape, {tokens: times * repeats for tokens, times in forwards.items()}, tensor_parallel
    )


def _all_reduces(shape: ModelShape, forwards: dict[int, int], tensor_parallel: int) -> Traffic:
    """Count the sums over tp ranks of forwards, by their number of tokens."""
    total = Traffic()
    if tensor_parallel == 1 or not shape.all_reduces:
        return total
    # All of them are as wide as the model.
    width = shape.all_reduced_elements_per_token // shape.all_reduces
    for tokens, times in forwards.items():
        if tokens and times:
            payload = tokens * width * shape.bytes_per_element
            choice = sum_choice(tensor_parallel, tokens * width, shape.bytes_per_element)
            move = gather_bytes if choice == "gather" else reduce_bytes
            sums = times * shape.all_reduces
            total.add(sums * move(payload, tensor_parallel), sums)
    return total


def _answer_forwards(
    query_tokens: int, answer_tokens: int, tokens_per_forward: int
) -> dict[int, int]:
    """Return the number of forwards of one answer, by their number of tokens."""
    whole, rest = divmod(query_tokens, tokens_per_forward)
    forwards = {tokens_per_forward: whole, rest: 1 if rest else 0}
    forwards[1] = forwards.get(1, 0) + max(answer_tokens - 1, 0)
    return forwards
