"""Sinks and a sliding window inside transformers: what StreamingLLM's tokens see, in phase 1.

Token i sees the first `anchor_size` tokens (the sinks) and the last `block_size` up to itself, `i - j < block_size`. No more
than these are held at any time, and no more stay behind.

Axes: B batch, S tokens of a forward, G KV heads, H query heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.state import State, merge
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import SpanCache, SpanPlace, _by_token, _StarLayer
from star_attention.planning.plan import BlockPlan
from star_attention.storage.kv import ContextKV, LayerKV, Pair


class WindowLayer(_StarLayer):
    place: SpanPlace

    def __init__(
        self, index: int, place: SpanPlace, window: int | None, stores: list[LayerKV]
    ) -> None:
        super().__init__(index, place, window)
        self.stores = stores  # one per context of the batch, written at the end
        self._new: Pair | None = None  # of the forward that runs, or ran last
        self._sinks: Pair | None = None
        self._recent: Pair | None = None  # before that forward

    @property
    def kv(self) -> LayerKV:
        return self.stores[0]

    def learn(self, *, expands: bool) -> None:
        for store in self.stores:
            store.expands = expands

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        self._roll()
        missing = self.place.plan.anchor_size - self.place.span.start
        if missing > 0:
            self._sinks = _joined(
                self._sinks, (k_BGSD[:, :, :missing].clone(), v_BGSD[:, :, :missing].clone())
            )
        self._new = k_BGSD, v_BGSD
        if not self.kv.expands:
            return self._new
        # What is kept becomes keys and values outside; all that this forward looks at goes through together.
        parts = [pair for pair in (self._sinks, self._recent, self._new) if pair is not None]
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def _roll(self) -> None:
        """The last forward's tokens become the most recent ones."""
        if self._new is None:
            return
        k, v = _joined(self._recent, self._new)
        size = self.place.plan.block_size
        self._recent = k[:, :, -size:].clone(), v[:, :, -size:].clone()
        self._new = None

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        size, start = self.place.plan.block_size, self.place.span.start
        sinks, recent = (
            None if pair is None else _by_token(pair) for pair in (self._sinks, self._recent)
        )
        if self.kv.expands:
            a = 0 if sinks is None else sinks[0].shape[1]
            r = 0 if recent is None else recent[0].shape[1]
            sinks = (k_BKGD[:, :a], v_BKGD[:, :a]) if a else None
            if (
                start > 0
            ):  # (in the first forward the sinks are its own, and `keep` did not know yet)
                recent = (k_BKGD[:, a : a + r], v_BKGD[:, a : a + r])
                k_BKGD, v_BKGD = k_BKGD[:, a + r :], v_BKGD[:, a + r :]
        before = 0
        if recent is not None:
            before = recent[0].shape[1]
            k_BKGD, v_BKGD = torch.cat([recent[0], k_BKGD], 1), torch.cat([recent[1], v_BKGD], 1)
        own = rule.window
        near = replace(rule, window=size if own is None else min(size, own))
        states = [attend(q_BQHD, k_BKGD, v_BKGD, rule=near, offset=before)]
        # Sinks that the window does not hold: token i sees sink j from i - j = block_size on, as far as the layer itself looks.
        if sinks is not None and (own is None or own > size) and start + q_BQHD.shape[1] > size:
            far = replace(rule, window=None if own is None else own - size)
            states.append(attend(q_BQHD, *sinks, rule=far, offset=start - size))
        return merge(states, dtype=rule.dtype)

    def finish(self) -> None:
        """Write what stays behind."""
        self._roll()
        if self._recent is None:  # reads another layer's keys
            return
        pairs = [pair for pair in (self._sinks, self._recent) if pair is not None]
        for (start, stop), pair in zip(
            self.kv.segments, pairs, strict=False
        ):  # (one where all are sinks)
            for store, k_GSD, v_GSD in zip(self.stores, *pair, strict=True):
                store.write(start, k_GSD[:, start - stop :], v_GSD[:, start - stop :])
        self._sinks = self._recent = None


def _joined(before: Pair | None, new: Pair) -> Pair:
    return (
        new
        if before is None
        else (torch.cat([before[0], new[0]], 2), torch.cat([before[1], new[1]], 2))
    )


class WindowCache(SpanCache):
    """Phase 1 for one context or several of equal length."""

    def __init__(
        self, plan: BlockPlan, stores: list[ContextKV], windows: list[int | None], comm: Comm
    ) -> None:
        place = SpanPlace(plan)
        layers: list[Any] = [
            WindowLayer(index, place, window, [store.layers[index] for store in stores])
            for index, window in enumerate(windows)
        ]
        super().__init__(layers, place, comm)

    def finish(self) -> None:
        for layer in self.layers:
            layer.finish()
