"""Probing a model's layers: one forward of a few tokens shows what each of them stores.

Axes: B batch, S tokens, K keys, Q queries, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.state import State
from star_attention.distributed import SoloComm
from star_attention.hf.cache.base import ForwardPosition, P, StarCache, StarLayer, build_layers
from star_attention.hf.cache.latent import LatentAttention, Latents
from star_attention.hf.execution.layer_part import HiddenShape, HiddenStates
from star_attention.planning.model_shape import SCALE_BYTES, STORED_BYTES
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, LayerKV

TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class LayerKVShape:
    """The shape of a token's entry in a cache layer.

    Attributes:
        k_heads: number of key heads.
        k_size: elements of each key.
        v_heads: number of value heads.
        v_size: elements of each value.
        dtype: precision of both.
        expands: True if attention computes its keys and values from the stored ones (MLA).
    """

    k_heads: int
    k_size: int
    v_heads: int
    v_size: int
    dtype: torch.dtype
    expands: bool

    @property
    def elements(self) -> int:
        """Elements stored for each token."""
        return self.k_heads * self.k_size + self.v_heads * self.v_size

    def stored_bytes(self, kv_dtype: str | None) -> int:
        """Return the bytes stored for each token; quantized heads have a scale in fp32."""
        if kv_dtype is None:
            return self.elements * self.dtype.itemsize
        scales = self.k_heads + self.v_heads
        return self.elements * STORED_BYTES[kv_dtype] + scales * SCALE_BYTES


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Properties of a model's layers, observed in one forward.

    Attributes:
        layer_shapes: shape of each cache layer's entries, None for layers that read another's keys.
        reads_own_keys: True if every attention reads the keys of its own layer alone, and once.
        query_group: query heads of a KV head, at most.
        latents: of each cache layer the attention that expands what it stores; None if there is
            none, or if it does so in a way that is not known.
        hidden: what layers take and return; None if a forward cannot run a part of them.
    """

    layer_shapes: list[LayerKVShape | None]
    reads_own_keys: bool
    query_group: int
    latents: Latents
    hidden: HiddenShape | None


class ProbeLayer(StarLayer[P]):
    """Stores nothing, and remembers the keys and values that it is passed."""

    def __init__(self, index: int, window: int | None, position: P, stores: list[LayerKV]) -> None:
        super().__init__(index, window, position, stores)
        self.pair: tuple[Tensor, Tensor] | None = None
        self.was_read = False
        self.latent: LatentAttention | None = None

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        self.pair = k_BGSD, v_BGSD
        return k_BGSD, v_BGSD

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        out_BQHD = q_BQHD.new_zeros(*q_BQHD.shape[:3], v_BKGD.shape[3], dtype=torch.float32)
        return State(out_BQHD, out_BQHD[..., 0])

    def note_reading(self, module: Any, key: Tensor, value: Tensor) -> None:
        """Note that an attention module reads this layer, as keys and values `[B, G, K, D]`."""
        self.latent = None
        if not (self.was_read or self.pair is None or self.owns(key, value)):
            self.latent = LatentAttention.of(module, self.pair, (key, value))
        self.was_read = True

    def shape(self) -> LayerKVShape | None:
        """Return the shape of the layer's entries, None if it reads another layer's keys."""
        if self.pair is None:
            return None
        k_BGSD, v_BGSD = self.pair
        return LayerKVShape(
            k_heads=k_BGSD.shape[1],
            k_size=k_BGSD.shape[3],
            v_heads=v_BGSD.shape[1],
            v_size=v_BGSD.shape[3],
            dtype=k_BGSD.dtype,
            expands=bool(self.kv.expands),
        )


class ProbeCache(StarCache):
    layers: list[ProbeLayer[ForwardPosition]]

    def __init__(self, layers: list[Any], position: ForwardPosition) -> None:
        super().__init__(layers, position, SoloComm())
        self.reads_own_keys = True
        self.query_group = 1

    def attend(self, module: Any, q_BQHD: Tensor, key: Tensor, value: Tensor, rule: Rule) -> State:
        assert self.position.last_layer is not None, "attention before any update of the cache"
        last = self.layers[self.position.last_layer]
        own = getattr(module, "layer_idx", None) == last.index and last.owns(key, value)
        self.reads_own_keys = self.reads_own_keys and own and not last.was_read
        self.query_group = max(self.query_group, q_BQHD.shape[2] // key.shape[1])
        last.note_reading(module, key, value)
        return super().attend(module, q_BQHD, key, value, rule)


def no_stores(windows: list[int | None]) -> list[ContextKV]:
    """Stores for layers that write nothing into them."""
    return [ContextKV.empty(Segments.prefix(TOKENS), [None] * len(windows))]


def run_probe(handle: Any, cache: StarCache) -> None:
    """Send a few tokens through the decoder of a `ModelHandle`."""
    ids_1S = torch.full((1, TOKENS), handle.vocab_size // 2, device=handle.device)
    positions_1S = torch.arange(TOKENS, device=handle.device)[None]
    handle.encode(ids_1S, positions_1S, cache, 2 * TOKENS if handle.rotaries else None)


def probe_layers(handle: Any) -> ProbeResult:
    """Probe the decoder of a `ModelHandle` with a forward of a few tokens."""
    position = ForwardPosition()
    stores = no_stores(handle.windows)
    cache = ProbeCache(build_layers(ProbeLayer, handle.windows, position, stores), position)
    watched = HiddenStates(handle.decoder, len(handle.windows))
    cache.part = watched
    run_probe(handle, cache)
    return ProbeResult(
        layer_shapes=[layer.shape() for layer in cache.layers],
        reads_own_keys=cache.reads_own_keys,
        query_group=cache.query_group,
        latents=[layer.latent for layer in cache.layers],
        hidden=watched.shape if cache.reads_own_keys else None,
    )
