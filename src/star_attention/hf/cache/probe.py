"""What each layer of a model keeps and attends with, seen in one forward of a few tokens.

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
from star_attention.hf.cache.base import StarCache, _Place, _StarLayer
from star_attention.planning.segments import Segments
from star_attention.storage.kv import LayerKV

TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class LayerKVShape:
    """What one cache layer keeps of a token: `k_heads` keys of `k_size` and `v_heads` values of `v_size` numbers.

    expands: its attention computes keys and values from that (MLA).
    """

    k_heads: int
    k_size: int
    v_heads: int
    v_size: int
    dtype: torch.dtype
    expands: bool

    @property
    def numbers(self) -> int:
        """Numbers a token."""
        return self.k_heads * self.k_size + self.v_heads * self.v_size


class ProbePlace(_Place):
    seen_tokens = 0


class ProbeLayer(_StarLayer):
    """Keeps nothing, and notes what it is given."""

    def __init__(self, index: int, place: ProbePlace, window: int | None) -> None:
        super().__init__(index, place, window)
        self._kv = LayerKV(Segments.prefix(TOKENS))
        self.given: tuple[Tensor, Tensor] | None = None
        self.was_read = False

    @property
    def kv(self) -> LayerKV:
        return self._kv

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        self.given = k_BGSD, v_BGSD
        return k_BGSD, v_BGSD

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        out_BQHD = q_BQHD.new_zeros(*q_BQHD.shape[:3], v_BKGD.shape[3], dtype=torch.float32)
        return State(out_BQHD, out_BQHD[..., 0])

    def kept(self) -> LayerKVShape | None:
        """What this layer keeps; None for one that reads another layer's keys."""
        if self.given is None:
            return None
        k_BGSD, v_BGSD = self.given
        return LayerKVShape(
            k_heads=k_BGSD.shape[1],
            k_size=k_BGSD.shape[3],
            v_heads=v_BGSD.shape[1],
            v_size=v_BGSD.shape[3],
            dtype=k_BGSD.dtype,
            expands=bool(self._kv.expands),
        )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What each cache layer keeps, and whether every attention reads just what its own layer has kept."""

    kept: list[LayerKVShape | None]
    simple: bool


class _ProbeCache(StarCache):
    simple = True

    def attend(self, module: Any, q_BQHD: Tensor, key: Tensor, value: Tensor, rule: Rule) -> State:
        last: ProbeLayer = self.layers[self.place.last]
        own = getattr(module, "layer_idx", None) == last.index and last.handed_out(key, value)
        self.simple = self.simple and own and not last.was_read
        last.was_read = True
        return super().attend(module, q_BQHD, key, value, rule)


def look(handle: Any) -> Seen:
    """Send a few tokens through a loaded model and watch."""
    place = ProbePlace()
    layers = [ProbeLayer(index, place, window) for index, window in enumerate(handle.windows)]
    ids_1S = torch.full((1, TOKENS), handle.vocab_size // 2, device=handle.device)
    positions_1S = torch.arange(TOKENS, device=handle.device)[None]
    rope_length = 2 * TOKENS if handle.rotaries else None
    cache = _ProbeCache(layers, place, SoloComm())
    handle.encode(ids_1S, positions_1S, cache, rope_length)
    return Seen(kept=[layer.kept() for layer in layers], simple=cache.simple)
