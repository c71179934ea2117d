"""The cache of phase 1: one span per forward, blocks attend to themselves, the anchor, and blocks
that they look back to.

Axes: B contexts, G KV heads, S new tokens, K keys, Q queries, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.blocks import KV, block_attention
from star_attention.attention.state import State
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import (
    ForwardPosition,
    StarCache,
    StarLayer,
    build_layers,
    by_token,
)
from star_attention.planning.plan import BlockPlan, Span
from star_attention.planning.segments import Segments
from star_attention.planning.windows import dropping
from star_attention.storage.kv import ContextKV, LayerKV


class KVLink:
    """Takes keys and values to the ranks that need them and lack them, layer by layer."""

    def send(self, layer: int, span: Span, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        """Pass on what others need of the keys and values that a layer has just stored."""

    def wait_for(self, layer: int) -> None:
        """Return once all that a layer needs has arrived."""

    def finish(self) -> None:
        """Return once all is sent."""


@dataclass(kw_only=True)
class SpanPosition(ForwardPosition):
    """The span of the plan that the current forward encodes."""

    plan: BlockPlan
    span: Span = field(default_factory=lambda: Span(start=0, stop=0, block_start=0))

    @property
    def seen_tokens(self) -> int:
        return self.span.start


@dataclass(kw_only=True)
class EncodePosition(SpanPosition):
    """The span, where the anchor is stored if not with the context, and how it gets there."""

    segments: Segments
    """The context tokens of this rank."""
    dropping: list[int | None]
    """Windows of the layers of which the context does not keep all tokens, None for others."""
    anchors: list[ContextKV] | None
    link: KVLink
    lookbacks: list[int]
    """Blocks that each layer looks back."""
    recents: list[Recent]
    """What each layer looks back to and cannot read from the stores."""
    keeps_own: bool
    """True if the stores do not hold this rank's blocks as computed."""


class SpanCache(StarCache):
    """A cache that encodes one `span` per forward into its layers' stores."""

    position: SpanPosition

    @property
    def span(self) -> Span:
        """The tokens that the current forward encodes."""
        return self.position.span

    @span.setter
    def span(self, span: Span) -> None:
        self.position.span = span

    @property
    def merges_ranks(self) -> bool:
        return False

    @property
    def bytes_per_token(self) -> int:
        """Bytes stored so far for each token, of all contexts together."""
        stores: list[LayerKV] = [store for layer in self.layers for store in layer.stores]
        return sum(store.nbytes for store in stores) // max(store.tokens or 1 for store in stores)


Piece = tuple[int, Tensor, Tensor]
"""A first token, and keys and values from there on, `[B, G, tokens, D]`."""


class Recent:
    """Keys and values of the latest tokens as computed, piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def add(self, start: int, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        """Add the tokens from `start` on."""
        self._pieces.append((start, k_BGSD, v_BGSD))

    def add_last(self, tokens: int, start: int, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        """Add the last tokens of those from `start` on, as copies: the others are not kept."""
        skipped = max(0, k_BGSD.shape[2] - tokens)
        self.add(start + skipped, k_BGSD[:, :, skipped:].clone(), v_BGSD[:, :, skipped:].clone())

    def drop_before(self, first: int) -> None:
        """Drop tokens before `first`."""
        self._pieces = [piece for piece in self._pieces if piece[0] + piece[1].shape[2] > first]

    def between(self, first: int, stop: int) -> list[Piece]:
        """Return what there is of the tokens `first..stop`, in order."""
        pieces = []
        for start, k_BGSD, v_BGSD in sorted(self._pieces, key=lambda piece: piece[0]):
            part = slice(max(0, first - start), stop - start)
            if start < stop and part.start < k_BGSD.shape[2]:
                pieces.append((start + part.start, k_BGSD[:, :, part], v_BGSD[:, :, part]))
        return pieces


class EncodeLayer(StarLayer[EncodePosition]):
    def __init__(
        self, index: int, window: int | None, position: EncodePosition, stores: list[LayerKV]
    ) -> None:
        super().__init__(index, window, position, stores)
        anchors = position.anchors
        # Later tokens see what is in the window alone: no rank's stores keep the rest.
        self._drops = position.dropping[index] is not None
        if self._drops and position.segments.holds(0):
            anchors = None
        self.anchors = stores if anchors is None else [kv.layers[index] for kv in anchors]
        self.lookback = position.lookbacks[index]
        self._recent = position.recents[index]
        self._keeps_own = self._drops or (position.keeps_own and self.lookback > 0)

    def set_expands(self, expands: bool) -> None:
        for store in (*self.stores, *self.anchors):
            store.expands = expands

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        span, plan = self.position.span, self.position.plan
        stores = self._stores_of(span.start)
        write_kept(stores, span.start, k_BGSD, v_BGSD)
        anchor_tokens = min(span.stop, plan.anchor_size) - span.start
        if stores is not self.anchors and anchor_tokens > 0:
            write_kept(
                self.anchors, span.start, k_BGSD[:, :, :anchor_tokens], v_BGSD[:, :, :anchor_tokens]
            )
        self.position.link.send(self.index, span, k_BGSD, v_BGSD)
        # The anchor in a window may be before the blocks that are seen.
        self._recent.drop_before(self._in_window if self._drops else self._first_seen)
        if self._drops and stores is self.stores:
            assert self.window is not None
            self._recent.add_last(self.window - 1, span.start, k_BGSD, v_BGSD)
        elif self._keeps_own and stores is self.stores:
            self._recent.add(span.start, k_BGSD, v_BGSD)
        if not self.kv.expands or span.start == 0:
            return k_BGSD, v_BGSD
        parts = [(k_BGSD, v_BGSD)]
        if self._first_seen < span.start:
            parts.insert(0, self._earlier())
        if self._needs_anchor:
            parts.insert(0, self._anchor())
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        span, plan = self.position.span, self.position.plan
        first = self._first_seen
        anchor: Callable[[], KV] = partial(_by_token, self._anchor)
        earlier: Callable[[], KV] = partial(_by_token, self._earlier)
        if self.kv.expands and span.start > 0:
            a = plan.anchor_size - self._in_window if self._needs_anchor else 0
            e = a + span.start - first
            anchor = partial(_part, k_BKGD, v_BKGD, slice(a))
            earlier = partial(_part, k_BKGD, v_BKGD, slice(a, e))
            k_BKGD, v_BKGD = k_BKGD[:, e:], v_BKGD[:, e:]
        state = block_attention(
            q_BQHD,
            (k_BKGD, v_BKGD),
            anchor=anchor if self._needs_anchor else None,
            earlier=cache(earlier) if first < span.start else None,
            span=span,
            plan=plan,
            rule=rule,
            lookback=self.lookback,
        )
        # Other ranks wait until what they sent has arrived, whether it is seen here or not.
        self.position.link.wait_for(self.index)
        return state

    @property
    def _in_window(self) -> int:
        """First token that the span sees, where only what is in the window is kept; else 0."""
        if not self._drops:
            return 0
        assert self.window is not None
        return max(0, self.position.span.start - self.window + 1)

    def leave_out(self) -> None:
        self.position.link.wait_for(self.index)

    @property
    def _first_seen(self) -> int:
        """First token of the run that the span's first block sees."""
        plan, start = self.position.plan, self.position.span.block_start
        return max(self._in_window, plan.first_seen(start, self.lookback, self.window))

    @property
    def _needs_anchor(self) -> bool:
        """True if a part of the anchor is seen that is not in the span or in the run before it."""
        return self.position.plan.anchor_size > self._in_window and self._first_seen > 0

    def _stores_of(self, token: int) -> list[LayerKV]:
        """Return the stores that a token is written to: the context's, or the anchor's own."""
        return self.stores if self.position.segments.holds(token) else self.anchors

    def _earlier(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the tokens before this forward that its first block sees."""
        first, start = self._first_seen, self.position.span.start
        self.position.link.wait_for(self.index)
        pieces = self._recent.between(first, start)
        stores = self._stores_of(start)
        if not self._keeps_own or stores is not self.stores:
            pieces += [
                (a, *_batch(store.slice(a, b) for store in stores))
                for a, b in stores[0].segments.within(first, start)
            ]
        pieces.sort(key=lambda piece: piece[0])
        assert sum(keys.shape[2] for _, keys, _ in pieces) == start - first, "tokens are missing"
        return _joined([pair for _, *pair in pieces], 2)

    def _anchor(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the anchor, as far as it is in the window."""
        first, stop = self._in_window, self.position.plan.anchor_size
        self.position.link.wait_for(self.index)
        if self.anchors is self.stores and self._drops:
            return _joined([pair for _, *pair in self._recent.between(first, stop)], 2)
        return _batch(store.slice(first, stop) for store in self.anchors)


class EncodeCache(SpanCache):
    """The cache of phase 1: each forward is one `span` of the plan.

    Args:
        plan: blocks, spans and anchor of the contexts, which all have the same length.
        stores: this rank's keys and values, one for each context of the batch.
        windows: sliding window of each layer in tokens, None for full attention.
        comm: ticked with each layer's attention.
        anchors: stores of the anchor, where the shard lacks it, or holds it rounded.
        link: how keys and values of other ranks get there.
        recents: for each layer, where blocks of other ranks arrive that are looked back to; None if
            there are none.
        keeps_own: whether own blocks that are looked back to are kept as computed, where the stores
            round them or are in host memory.
    """

    def __init__(
        self,
        plan: BlockPlan,
        stores: list[ContextKV],
        windows: list[int | None],
        comm: Comm,
        *,
        anchors: list[ContextKV] | None = None,
        link: KVLink | None = None,
        recents: list[Recent] | None = None,
        keeps_own: bool = True,
    ) -> None:
        position = EncodePosition(
            plan=plan,
            segments=stores[0].segments,
            dropping=dropping(windows, plan.context_tokens, stores[0].kv_format.windows),
            anchors=anchors,
            link=link or KVLink(),
            lookbacks=plan.lookbacks(len(windows)),
            recents=recents or [Recent() for _ in windows],
            keeps_own=keeps_own and not stores[0].kv_format.as_computed,
        )
        super().__init__(build_layers(EncodeLayer, windows, position, stores), position, comm)


def _by_token(read: Callable[[], tuple[Tensor, Tensor]]) -> KV:
    return by_token(read())


def _part(k_BKGD: Tensor, v_BKGD: Tensor, part: slice) -> KV:
    return k_BKGD[:, part], v_BKGD[:, part]


def write_kept(stores: list[LayerKV], start: int, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
    """Store what a layer keeps of the tokens from `start` on, of each context of the batch."""
    for first, stop in stores[0].segments.within(start, start + k_BGSD.shape[2]):
        part = slice(first - start, stop - start)
        for store, k_GSD, v_GSD in zip(stores, k_BGSD, v_BGSD, strict=True):
            store.write(first, k_GSD[:, part], v_GSD[:, part])


def _batch(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join keys and values of all contexts of the batch."""
    return _joined(pairs, 0)


def _joined(pairs: Iterable[Iterable[Tensor]], axis: int) -> tuple[Tensor, Tensor]:
    keys, values = zip(*pairs, strict=True)
    if len(keys) == 1:
        return keys[0], values[0]
    return torch.cat(keys, axis), torch.cat(values, axis)
