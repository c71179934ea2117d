"""What a user would otherwise run: stock transformers, and the scheme of the paper's own implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from star_attention.distributed import SoloComm
from star_attention.hf.cache.encode import EncodeCache
from star_attention.hf.execution.compiled import FULL
from star_attention.hf.execution.handle import ModelHandle, cache_argument
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.storage.kv import DEFAULT_FORMAT, ContextKV, KVFormat

Anchor = tuple[Tensor, Tensor]
"""Token ids, and the positions at which they say that they stand, `[A]` each."""

STOCK_BACKENDS: dict[str, SDPBackend | None] = {
    "stock": None,
    "stock-cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""transformers' own dense prefill, with the attention kernel that torch takes by itself and pinned to cuDNN's."""


@torch.no_grad()
def stock_prefill(model: Any, ids_L: Tensor, backend: SDPBackend | None) -> Any:
    """All tokens in one forward of the decoder, keys and values kept: the cache."""
    cache = DynamicCache()
    decoder = model.get_decoder()
    with _sdpa(model), nullcontext() if backend is None else sdpa_kernel(backend):
        decoder(
            input_ids=ids_L[None].to(decoder.device),
            use_cache=True,
            **{cache_argument(decoder.forward): cache},
        )
    return cache


@contextmanager
def _sdpa(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def official_encode(
    handle: ModelHandle,
    ids_L: Tensor,
    plan: BlockPlan,
    tokens_per_forward: int,
    *,
    anchor_of: Callable[[int, int], Anchor | None] | None = None,
    kv_format: KVFormat = DEFAULT_FORMAT,
) -> ContextKV:
    """The paper's own implementation, with this library's kernels: the anchor is encoded again in front of every block.

    The same keys and values as `phase1.encode`, for twice the linear work of all blocks but the first. anchor_of: what else stands
    in front of the block `start..stop`, and at which positions; None for nothing. kv_format: how the result is
    stored; a block sees itself as it was computed, where `phase1.encode` reads back what earlier forwards have stored.
    """
    store = ContextKV.empty(
        Segments.prefix(plan.context_tokens), [None] * len(handle.windows), kv_format
    )
    for start, stop in plan.blocks:
        if anchor_of is None:
            size = plan.anchor_size if start else 0
            front: Anchor | None = (ids_L[:size], torch.arange(size))
        else:
            front = anchor_of(start, stop)
        ids_A, places_A = front or (ids_L[:0], torch.arange(0))
        anchor = len(ids_A)
        ids_S = torch.cat([ids_A, ids_L[start:stop]])
        positions_S = torch.cat([places_A, torch.arange(start, stop)])
        both = ContextKV.empty(Segments.prefix(len(positions_S)), [None] * len(handle.windows))
        dense = BlockPlan.dense(len(positions_S))
        cache = EncodeCache(dense, [both], handle.windows, SoloComm())
        for span in dense.spans(tokens_per_forward):
            cache.span = span
            part = slice(span.start, span.stop)
            mode = FULL if span.tokens == tokens_per_forward else None
            handle.encode(
                ids_S[part][None].to(handle.device),
                positions_S[part][None].to(handle.device),
                cache,
                None,
                compiled_for=mode,
            )
        for layer, kept in zip(store.layers, both.layers, strict=True):
            if not kept.is_empty:
                k_1GSD, v_1GSD = kept.slice(anchor, len(positions_S))
                layer.write(start, k_1GSD[0], v_1GSD[0])
    return store
