"""Which contexts the kernels of CUDA graphs can read where and as they are stored."""

from __future__ import annotations

import torch

from star_attention.hf.cache.arrivals import arrives
from star_attention.hf.cache.latent import Latents
from star_attention.hf.cache.probe import LayerKVShape
from star_attention.storage.kv import ContextKV, LayerKV

Shapes = list[LayerKVShape | None]
"""Shape of each cache layer's entries, None for layers that read another layer's keys."""


def can_read(
    shard: ContextKV, shapes: Shapes, device: torch.device, latents: Latents | None = None
) -> bool:
    """True if all of a rank's shard is stored as a kernel reads it; it may be empty.

    Args:
        shard: the rank's part of a context.
        shapes: shapes of the layers' entries.
        device: where the kernel runs.
        latents: of each layer the attention that need not expand what it stores, where there is a
            kernel for that.
    """
    from star_attention.attention.kernels import triton_answer

    kv_format = shard.kv_format
    if kv_format.dtype not in (None, "fp8") or shard.visible is not None:
        return False
    known = _has_one_kind(shapes) if latents is None else _are_latent(shapes, latents)
    if len(shard.segments) > triton_answer.MAX_SEGMENTS or not known:
        return False
    return all(_is_read_on(layer, device) for layer in shard.layers if not layer.is_empty)


def _is_read_on(layer: LayerKV, device: torch.device) -> bool:
    """True if the kernel finds a layer on the device; it may arrive there from host memory."""
    pair = layer.stored()[:2]
    is_there = all(tensor.device == device for tensor in pair)
    return (is_there or (arrives(layer) and layer.reads_on == device)) and all(
        tensor.is_contiguous() for tensor in pair
    )


def _are_latent(shapes: Shapes, latents: Latents) -> bool:
    """True if all layers store compressed keys that the kernel over them knows, in one dtype."""
    from star_attention.attention.kernels.triton_latent import MOST_COMPRESSED

    layers = [(shape, latent) for shape, latent in zip(shapes, latents, strict=True) if shape]
    return len({shape.dtype for shape, _ in layers}) == 1 and all(
        latent is not None and shape.k_size <= MOST_COMPRESSED and shape.k_size % 2 == 0
        for shape, latent in layers
    )


def _has_one_kind(shapes: Shapes) -> bool:
    """True if keys and values of all layers have shapes that the kernel knows, and one dtype."""
    kinds = set()
    for shape in filter(None, shapes):
        if shape.expands or (shape.k_heads, shape.k_size) != (shape.v_heads, shape.v_size):
            return False
        if shape.k_size % 16 or shape.k_size > 256:
            return False
        kinds.add(shape.dtype)
    return len(kinds) == 1
