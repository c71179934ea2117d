"""Phase 1: encode a context block by block, each block attending to itself and to the anchor (paper, section 2.1).

Every context token goes through the linear layers once: the anchor's keys and values do not depend on who looks at them,
so they are shared instead of being computed again for each block. Axes: B contexts, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from star_attention.errors import OutOfMemoryError
from star_attention.hf.cache import EncodeCache
from star_attention.hf.handle import ModelHandle
from star_attention.plan import BlockPlan, Span
from star_attention.store import ContextKV

Progress = Callable[[Span, BlockPlan], None]
"""Called after each forward with what it encoded."""


def encode(
    handle: ModelHandle,
    ids_BL: Tensor,
    plan: BlockPlan,
    *,
    tokens_per_forward: int,
    rope_length: int | None = None,
    stores: list[ContextKV] | None = None,
    start: int = 0,
    progress: Progress | None = None,
) -> list[ContextKV]:
    """Keys and values of B contexts of equal length, encoded as one batch.

    stores: to go on from token `start` (a block border) in stores that hold everything before it.

    Raises `OutOfMemoryError`, with the size to lower, when the device or the machine has too little memory; what was
    allocated is freed with it.
    """
    if stores is None:
        stores = [ContextKV.empty(len(handle.windows), plan.context_tokens) for _ in range(ids_BL.shape[0])]
    cache = EncodeCache(plan, stores, handle.windows)
    # One batch of contexts shares the forward's budget.
    budget = max(1, tokens_per_forward // ids_BL.shape[0])
    try:
        for span in plan.spans(budget, start=start):
            cache.span = span
            positions_1S = torch.arange(span.start, span.stop, device=handle.device)[None]
            handle.encode(ids_BL[:, span.start : span.stop].to(handle.device), positions_1S, cache, rope_length)
            if progress is not None:
                progress(span, plan)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory in phase 1 after {cache.span.start:,} of {plan.context_tokens:,} context tokens, with"
            f" {cache.span.tokens * ids_BL.shape[0]:,} tokens in one forward: lower tokens_per_forward (now"
            f" {tokens_per_forward:,}; it sets the working memory), or encode a shorter context (keys and values take"
            f" {_bytes_per_token(stores):,} bytes a token here)"
        ) from error
    return stores


def _bytes_per_token(stores: list[ContextKV]) -> int:
    return sum(store.nbytes for store in stores) // max(1, stores[0].tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """torch reports a full host as a plain `RuntimeError` of its allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
