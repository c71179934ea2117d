"""The alternatives: transformers' own prefill, and the scheme of the official implementation.

The official implementation is NVIDIA/Star-Attention at c61059f, the paper's own.

Axes: L tokens of the context, A of an anchor, S of an anchor with its block, G KV heads, D head
size.
"""

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
"""Token ids of an anchor, and the positions that rotary embeddings give them: int64 `[A]` each."""

STOCK_BACKENDS: dict[str, SDPBackend | None] = {
    "stock": None,
    "stock-cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Backends of `stock_prefill` by name: the one that torch chooses, and cuDNN's."""


@torch.no_grad()
def stock_prefill(model: Any, ids_L: Tensor, backend: SDPBackend | None) -> Any:
    """Run transformers' own dense prefill: all tokens in one forward of the decoder.

    Args:
        model: a transformers model.
        ids_L: token ids `[L]`, int64.
        backend: the attention kernel; None lets torch choose.

    Returns:
        transformers' cache with the keys and values.
    """
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
    """Make a model use torch's attention, and restore its own."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


@torch.no_grad()
def official_encode(
    handle: ModelHandle,
    ids_L: Tensor,
    plan: BlockPlan,
    tokens_per_forward: int,
    *,
    anchor_of: Callable[[int, int], Anchor | None] | None = None,
    kv_format: KVFormat = DEFAULT_FORMAT,
    cp_rank: int = 0,
) -> ContextKV:
    """Encode a context as the official implementation does, with this library's kernels.

    The anchor is encoded again with every block. The result equals that of `phase1.encode`, for
    twice the linear work of all blocks but the first. Only rounding differs: a block attends to
    its own keys and values as computed, where `phase1.encode` reads back what earlier forwards have
    stored. Ranks do not exchange anything. Source: arXiv 2411.17116, Algorithm 1.

    Args:
        handle: the model.
        ids_L: token ids `[L]`, int64.
        plan: the blocks and their ranks.
        tokens_per_forward: most tokens in one forward.
        anchor_of: returns the anchor of the block `start..stop`, or None for no anchor. By default
            it is the head of the context, for all blocks but the first.
        kv_format: how the result is stored.
        cp_rank: the context-parallel rank whose blocks to encode.

    Returns:
        Keys and values of the rank's blocks, without those of the anchors.
    """

    def first_tokens(start: int, stop: int) -> Anchor | None:
        return (ids_L[: plan.anchor_size], torch.arange(plan.anchor_size)) if start else None

    store = _empty_store(handle, plan.layout[cp_rank], kv_format)
    for start, stop in plan.rank_blocks(cp_rank):
        anchor = (anchor_of or first_tokens)(start, stop)
        ids_S, positions_S = ids_L[start:stop], torch.arange(start, stop)
        if anchor is not None:
            ids_S = torch.cat([anchor[0], ids_S])
            positions_S = torch.cat([anchor[1], positions_S])
        block = _encode_dense(handle, ids_S, positions_S, tokens_per_forward)
        own_start = len(ids_S) - (stop - start)
        for layer, block_layer in zip(store.layers, block.layers, strict=True):
            if not block_layer.is_empty:
                k_1GSD, v_1GSD = block_layer.slice(own_start, len(ids_S))
                layer.write(start, k_1GSD[0], v_1GSD[0])
    return store


def _encode_dense(
    handle: ModelHandle, ids_S: Tensor, positions_S: Tensor, tokens_per_forward: int
) -> ContextKV:
    """Encode tokens with causal attention, at given positions."""
    store = _empty_store(handle, Segments.prefix(len(ids_S)))
    plan = BlockPlan.dense(len(ids_S))
    cache = EncodeCache(plan, [store], handle.windows, SoloComm())
    for span in plan.spans(tokens_per_forward):
        cache.span = span
        tokens = slice(span.start, span.stop)
        handle.encode(
            ids_S[tokens][None].to(handle.device),
            positions_S[tokens][None].to(handle.device),
            cache,
            None,
            compiled_for=FULL if span.tokens == tokens_per_forward else None,
        )
    return store


def _empty_store(
    handle: ModelHandle, segments: Segments, kv_format: KVFormat = DEFAULT_FORMAT
) -> ContextKV:
    return ContextKV.empty(segments, [None] * len(handle.windows), kv_format)
