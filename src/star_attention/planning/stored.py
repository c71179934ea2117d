"""Bytes of keys and values that a rank stores of a context, and those that encoding takes.

Standard library only.
"""

from __future__ import annotations

from star_attention.planning.exchange import layer_kinds
from star_attention.planning.model_shape import TOKEN_ID_BYTES, ModelShape
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.windows import ALL, LAST, first_kept, kept


def stored_bytes(
    shape: ModelShape,
    plan: BlockPlan,
    rank: int,
    kv_dtype: str | None = None,
    kv_windows: str = LAST,
) -> int:
    """Return the bytes of a context-parallel rank's keys and values as stored.

    Args:
        shape: the model.
        plan: the blocks.
        rank: the rank.
        kv_dtype: as in `StarConfig`.
        kv_windows: as in `StarConfig`.
    """
    return segments_bytes(shape, plan.layout[rank], plan.context_tokens, kv_dtype, kv_windows)


def segments_bytes(
    shape: ModelShape,
    segments: Segments,
    context_tokens: int,
    kv_dtype: str | None = None,
    kv_windows: str = LAST,
) -> int:
    """Do as `stored_bytes` does, for a rank with these tokens of a context."""
    if kv_windows == ALL:
        return segments.tokens * shape.stored_bytes_per_token(kv_dtype)
    return sum(
        kept(segments, window, context_tokens).tokens * size
        for window, size in shape.stored_bytes_by_window(kv_dtype).items()
    )


def context_bytes(
    shape: ModelShape, context_tokens: int, kv_dtype: str | None = None, kv_windows: str = LAST
) -> int:
    """Return the bytes of a context's keys and values as stored, all ranks together."""
    everything = Segments.prefix(context_tokens)
    return segments_bytes(shape, everything, context_tokens, kv_dtype, kv_windows)


def saved_bytes(
    shape: ModelShape, context_tokens: int, kv_dtype: str | None = None, kv_windows: str = LAST
) -> int:
    """Return the bytes of a saved context, but for its header of a few KB."""
    stored = context_bytes(shape, context_tokens, kv_dtype, kv_windows)
    return stored + context_tokens * TOKEN_ID_BYTES


def recent_bytes(
    shape: ModelShape,
    plan: BlockPlan,
    tokens_per_forward: int,
    rank: int,
    *,
    as_computed: bool,
    kv_windows: str = LAST,
) -> int:
    """Return the bytes of tokens that are kept beside the stores while encoding, at most.

    A rank keeps what it reads of other ranks' blocks, what the stores do not hold as computed of
    its own where blocks look back, with those of the forward, and of layers that drop the rest the
    last window before a forward and at its end.

    Args:
        shape: the model.
        plan: the blocks.
        tokens_per_forward: most tokens of a forward.
        rank: the rank.
        as_computed: True if the stores hold keys and values as computed.
        kv_windows: as in `StarConfig`.
    """
    own, tokens = plan.layout[rank], plan.rank_tokens(rank)
    dropping = [
        window
        for window in shape.stored_bytes_by_window(None)
        if kv_windows == LAST and window and first_kept(plan.context_tokens, window) > 0
    ]
    in_windows = sum(
        size * min(tokens, 2 * (window - 1))
        for window, size in shape.stored_bytes_by_window(None).items()
        if window in dropping
    )
    if not plan.lookback:
        return in_windows
    kept = 0
    spans = list(plan.spans(tokens_per_forward, rank=rank))
    for kind, layers in layer_kinds(shape, plan).items():
        most = 0
        for span in spans if kind.lookback and kind.call.window not in dropping else []:
            first = plan.first_seen(span.block_start, kind.lookback, kind.call.window)
            stored = sum(stop - start for start, stop in own.within(first, span.stop))
            most = max(most, span.stop - first - (stored if as_computed else 0))
        kept += most * kind.token_bytes * layers
    return in_windows + kept


def working_bytes(shape: ModelShape, tokens: int, tensor_parallel: int = 1) -> int:
    """Estimate the working memory of a forward of `tokens` tokens, for a context of any length.

    Nearly every weight matrix has the hidden size on one side, so `linear_parameters / (layers *
    hidden_size)` is the number of elements per token that a layer's matrices read and write apart
    from hidden states. Added to these are four hidden states (the residual stream, its norm, a
    result, a sum) and the fp32 states of attention during a merge (own block, anchor, result, and a
    temporary).
    """
    widths = -(-shape.linear_parameters // (shape.layers * shape.hidden_size * tensor_parallel))
    widest = max((call.heads * call.v_head_size for call in shape.attention), default=0)
    states = 4 * 4 * widest // tensor_parallel
    return tokens * ((widths + 4 * shape.hidden_size) * shape.bytes_per_element + states)


def expanded_bytes(shape: ModelShape, keys: int) -> int:
    """Return the bytes of one layer's MLA expansion of `keys` keys.

    In phase 2 a query reads the whole shard at once.
    """
    if not shape.expansion_parameters:
        return 0
    widest = max(call.kv_heads * (call.k_head_size + call.v_head_size) for call in shape.attention)
    return keys * widest * shape.bytes_per_element
