"""The cache of StreamingLLM's phase 1: attention sinks and a sliding window.

Token i sees the first `anchor_size` tokens (the sinks) and the last `block_size` up to itself,
`i - j < block_size`. Only these are in memory at any time, and only these are stored at the end.

Axes: B contexts, S tokens of a forward, G KV heads, H query heads, K keys, D head size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.state import State, merge
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import StarLayer, build_layers, by_token
from star_attention.hf.cache.encode import SpanCache, SpanPosition
from star_attention.planning.plan import BlockPlan
from star_attention.storage.kv import ContextKV, LayerKV, Pair


class WindowLayer(StarLayer[SpanPosition]):
    def __init__(
        self, index: int, window: int | None, position: SpanPosition, stores: list[LayerKV]
    ) -> None:
        super().__init__(index, window, position, stores)
        self._sinks: Pair | None = None
        # The tokens of the current or last forward, and the most recent ones before them.
        self._new: Pair | None = None
        self._recent: Pair | None = None

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        self._roll()
        missing = self.position.plan.anchor_size - self.position.span.start
        if missing > 0:
            sinks = k_BGSD[:, :, :missing].clone(), v_BGSD[:, :, :missing].clone()
            self._sinks = _joined(self._sinks, sinks)
        self._new = k_BGSD, v_BGSD
        if not self.kv.expands:
            return self._new
        # The model expands all keys that this forward attends to in one call.
        parts = [pair for pair in (self._sinks, self._recent, self._new) if pair is not None]
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def _roll(self) -> None:
        """Make the last forward's tokens the most recent ones."""
        if self._new is None:
            return
        k, v = _joined(self._recent, self._new)
        size = self.position.plan.block_size
        self._recent = k[:, :, -size:].clone(), v[:, :, -size:].clone()
        self._new = None

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        size, start = self.position.plan.block_size, self.position.span.start
        sinks, recent = (
            None if pair is None else by_token(pair) for pair in (self._sinks, self._recent)
        )
        if self.kv.expands:
            a = 0 if sinks is None else sinks[0].shape[1]
            r = 0 if recent is None else recent[0].shape[1]
            sinks = (k_BKGD[:, :a], v_BKGD[:, :a]) if a else None
            # In the first forward the sinks are its own, and `append` could not know of the
            # expansion yet.
            if start > 0:
                recent = (k_BKGD[:, a : a + r], v_BKGD[:, a : a + r])
                k_BKGD, v_BKGD = k_BKGD[:, a + r :], v_BKGD[:, a + r :]
        before = 0
        if recent is not None:
            before = recent[0].shape[1]
            k_BKGD, v_BKGD = torch.cat([recent[0], k_BKGD], 1), torch.cat([recent[1], v_BKGD], 1)
        own = rule.window
        near = replace(rule, window=size if own is None else min(size, own))
        states = [attend(q_BQHD, k_BKGD, v_BKGD, rule=near, offset=before)]
        # Token i also sees sinks outside the window: sink j from i - j = block_size on, as far as
        # the layer itself looks.
        if sinks is not None and (own is None or own > size) and start + q_BQHD.shape[1] > size:
            far = replace(rule, window=None if own is None else own - size)
            states.append(attend(q_BQHD, *sinks, rule=far, offset=start - size))
        return merge(states, dtype=rule.dtype)

    def finish(self) -> None:
        """Write the sinks and the most recent tokens to the stores."""
        self._roll()
        # A layer that reads another layer's keys has none of its own.
        if self._recent is None:
            return
        pairs = [pair for pair in (self._sinks, self._recent) if pair is not None]
        # A short context consists of sinks alone, in one segment.
        for (start, stop), pair in zip(self.kv.segments, pairs, strict=False):
            for store, k_GSD, v_GSD in zip(self.stores, *pair, strict=True):
                store.write(start, k_GSD[:, start - stop :], v_GSD[:, start - stop :])
        self._sinks = self._recent = None


class WindowCache(SpanCache):
    """The cache of phase 1, for one context or several of equal length."""

    layers: list[WindowLayer]

    def __init__(
        self, plan: BlockPlan, stores: list[ContextKV], windows: list[int | None], comm: Comm
    ) -> None:
        position = SpanPosition(plan=plan)
        super().__init__(build_layers(WindowLayer, windows, position, stores), position, comm)

    def finish(self) -> None:
        """Write the keys and values that remain visible to the stores."""
        for layer in self.layers:
            layer.finish()


def _joined(before: Pair | None, new: Pair) -> Pair:
    if before is None:
        return new
    return torch.cat([before[0], new[0]], 2), torch.cat([before[1], new[1]], 2)
