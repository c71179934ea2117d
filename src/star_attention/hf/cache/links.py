"""How the anchor travels in phase 1: a broadcast per layer, from rank 0 to the other ranks.

Axes: B contexts, G KV heads, S tokens, D head size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.distributed.comm import Comm, Pending
from star_attention.hf.cache.encode import KVLink, write_kept
from star_attention.hf.cache.probe import LayerKVShape
from star_attention.planning.plan import BlockPlan, Span
from star_attention.storage.kv import ContextKV

_LAYERS_AHEAD = 2
"""Layers ahead of use for which a rank requests the anchor: enough to hide the transfer."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The shape of a layer's keys and values, and the device that they are computed on."""

    shape: LayerKVShape
    device: torch.device

    def room(self, tokens: int) -> Tensor:
        """Return an empty flat tensor for that many tokens, over all contexts."""
        return torch.empty(tokens * self.shape.elements, dtype=self.shape.dtype, device=self.device)


Places = dict[int, Place]
"""The place of each layer that stores keys and values."""


def pack(k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Return keys and values as one flat tensor."""
    return torch.cat([k_BGSD.reshape(-1), v_BGSD.reshape(-1)])


def unpack(packed: Tensor, shape: LayerKVShape, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values that `pack` made one tensor of: `k_BGSD, v_BGSD`."""
    keys = batch * tokens * shape.k_heads * shape.k_size
    return (
        packed[:keys].reshape(batch, shape.k_heads, tokens, shape.k_size),
        packed[keys:].reshape(batch, shape.v_heads, tokens, shape.v_size),
    )


class AnchorSender(KVLink):
    """Sends each layer's part of the anchor from rank 0 once it is computed, without waiting."""

    def __init__(self, comm: Comm, plan: BlockPlan) -> None:
        self._comm, self._plan = comm, plan
        self._pending: list[Pending] = []
        self._next: Span | None = None

    def send(self, layer: int, span: Span, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        tokens = min(span.stop, self._plan.anchor_size) - span.start
        if tokens > 0:
            packed = pack(k_BGSD[:, :, :tokens], v_BGSD[:, :, :tokens])
            self._pending.append(self._comm.broadcast(packed, self._plan.busy_ranks))
        elif self._next in (None, span):
            # Other ranks may still be in their first forward, which the anchor arrives in.
            self._next = span
        else:
            # It has arrived: drop what was sent, which is as large as the anchor.
            self.finish()

    def finish(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending.clear()


@dataclass(frozen=True)
class _AnchorPart:
    """One layer's keys and values of `tokens` anchor tokens from `start` on."""

    layer: int
    start: int
    tokens: int


class AnchorReceiver(KVLink):
    """Requests the anchor on other ranks a few layers ahead, in the order in which rank 0 sends."""

    def __init__(
        self,
        comm: Comm,
        plan: BlockPlan,
        places: Places,
        anchors: list[ContextKV],
        *,
        span_tokens: int,
    ) -> None:
        """Prepare for the anchor.

        Args:
            comm: the ranks.
            plan: blocks and anchor.
            places: the layers that store keys and values.
            anchors: stores of the anchor, one for each context.
            span_tokens: most tokens of each context in one forward of rank 0.
        """
        self._comm, self._plan, self._places, self._anchors = comm, plan, places, anchors
        self._waiting = deque(
            _AnchorPart(layer, span.start, min(span.stop, plan.anchor_size) - span.start)
            for span in plan.spans(span_tokens, rank=0)
            if span.start < plan.anchor_size
            for layer in places
        )
        self._in_flight: deque[tuple[_AnchorPart, Tensor, Pending]] = deque()

    def wait_for(self, layer: int) -> None:
        if not (self._waiting or self._in_flight):
            return
        # Rank 0 sends all layers of one part of the anchor, then all layers of the next part.
        last = max((i for i, part in enumerate(self._waiting) if part.layer == layer), default=-1)
        for _ in range(min(last + 1 + _LAYERS_AHEAD, len(self._waiting))):
            self._request_next()
        while any(part.layer == layer for part, *_ in self._in_flight):
            self._store_first()

    def _request_next(self) -> None:
        part = self._waiting.popleft()
        packed = self._places[part.layer].room(len(self._anchors) * part.tokens)
        pending = self._comm.broadcast(packed, self._plan.busy_ranks)
        self._in_flight.append((part, packed, pending))

    def _store_first(self) -> None:
        part, packed, pending = self._in_flight.popleft()
        pending.wait()
        shape = self._places[part.layer].shape
        k_BGSD, v_BGSD = unpack(packed, shape, len(self._anchors), part.tokens)
        stores = [store.layers[part.layer] for store in self._anchors]
        write_kept(stores, part.start, k_BGSD, v_BGSD)
