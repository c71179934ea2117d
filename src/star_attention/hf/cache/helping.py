"""What rank 0 computes for other ranks in phase 1, and how it gets there (`planning.helping`).

Layer by layer rank 0 sends keys and values of a forward, and at last the hidden states with which
the other rank goes on. All busy ranks take part in each exchange, in one order.

Axes: B contexts, G KV heads, S tokens, D head size, E elements of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.distributed.comm import Comm, Pending
from star_attention.hf.cache.encode import KVLink, SpanCache, write_kept
from star_attention.hf.cache.links import Places, pack, unpack
from star_attention.hf.execution.layer_part import HiddenShape, LayerPart
from star_attention.planning.helping import Help
from star_attention.planning.plan import Span
from star_attention.storage.kv import ContextKV

RunForward = Callable[[SpanCache, Span, LayerPart | None], None]
"""Runs a forward through some layers, or all."""


class Helping:
    """What a rank does in phase 1 beside its own forwards, or leaves to rank 0: here nothing."""

    def begin(self, run: RunForward, stores: list[ContextKV], anchors: list[ContextKV]) -> None:
        """Take what runs a forward, this rank's stores, and those of the anchor as computed."""

    def in_order(self, spans: Iterable[Span]) -> Iterable[Span]:
        """Return this rank's forwards in the order in which they run."""
        return spans

    def part(self, span: Span) -> LayerPart | None:
        """Return the layers of a forward that this rank runs, None for all."""
        return None

    def after(self, span: Span) -> None:
        """Do what follows a forward of this rank, before it pauses."""

    def finish(self) -> None:
        """Return once nothing is on its way."""


class HelpSender(KVLink):
    """Sends what rank 0 computes for another rank, without waiting."""

    def __init__(self, comm: Comm, rank: int, ranks: int) -> None:
        """Prepare to send.

        Args:
            comm: the ranks.
            rank: the context-parallel rank that is helped.
            ranks: the first cp ranks, which take part.
        """
        self._comm, self._rank, self._ranks = comm, rank, ranks
        self._pending: list[Pending] = []

    def send(self, layer: int, span: Span, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        self._send(pack(k_BGSD, v_BGSD))

    def send_hidden(self, hidden_BSE: Tensor) -> None:
        """Send the hidden states after the last layer of a forward."""
        self._send(hidden_BSE.reshape(-1))

    def _send(self, flat: Tensor) -> None:
        pending = self._comm.exchange(
            flat,
            flat.new_empty(0),
            sent={self._rank: flat.numel()},
            arriving={},
            total=flat.numel(),
            ranks=self._ranks,
            narrow=True,
        )
        self._pending.append(pending)

    def finish(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending.clear()


@dataclass(frozen=True, kw_only=True)
class _Arriving:
    """A tensor on its way to this rank: keys and values of a layer, or hidden states (None)."""

    layer: int | None
    span: Span
    flat: Tensor
    pending: Pending


class HelpReceiver:
    """Receives what rank 0 computes for this rank, and takes part in what it sends to others."""

    def __init__(
        self,
        comm: Comm,
        places: Places,
        hidden: HiddenShape,
        stores: list[ContextKV],
        *,
        ranks: int,
    ) -> None:
        """Prepare to receive.

        Args:
            comm: the ranks.
            places: the layers that store keys and values.
            hidden: the shape of hidden states.
            stores: this rank's keys and values, one store for each context.
            ranks: the first cp ranks, which take part.
        """
        self._comm, self._places, self._hidden = comm, places, hidden
        self._stores, self._ranks = stores, ranks
        self._arriving: list[_Arriving] = []
        self._others: list[Pending] = []
        self._hidden_states: dict[Span, Tensor] = {}

    def request(self, given: Help, spans: list[Span]) -> None:
        """Request all that rank 0 computes of a run; in the order of all ranks."""
        for span in spans:
            for layer in range(given.layers):
                self._request(given.rank, span, layer)
            self._request(given.rank, span, None, device=self._places[given.layers].device)

    def _request(
        self, rank: int, span: Span, layer: int | None, *, device: torch.device | None = None
    ) -> None:
        own = rank == self._comm.cp_rank
        if layer is None:
            elements, dtype = self._hidden.elements, self._hidden.dtype
        else:
            place = self._places[layer]
            elements, dtype, device = place.shape.elements, place.shape.dtype, place.device
        total = len(self._stores) * span.tokens * elements
        flat = torch.empty(total if own else 0, dtype=dtype, device=device)
        pending = self._comm.exchange(
            flat.new_empty(0),
            flat,
            sent={},
            arriving={0: total} if own else {},
            total=total,
            ranks=self._ranks,
            narrow=True,
        )
        if own:
            self._arriving.append(_Arriving(layer=layer, span=span, flat=flat, pending=pending))
        else:
            self._others.append(pending)

    def _keep(self) -> None:
        """Wait for all that was requested, and store it."""
        batch = len(self._stores)
        for each in self._take():
            each.pending.wait()
            if each.layer is None:
                self._hidden_states[each.span] = each.flat.view(batch, each.span.tokens, -1)
                continue
            shape = self._places[each.layer].shape
            k_BGSD, v_BGSD = unpack(each.flat, shape, batch, each.span.tokens)
            stores = [store.layers[each.layer] for store in self._stores]
            write_kept(stores, each.span.start, k_BGSD, v_BGSD)

    def hidden_states(self, span: Span) -> Tensor:
        """Return what the first layer of this rank takes of a forward, once."""
        self._keep()
        return self._hidden_states.pop(span)

    def finish(self) -> None:
        """Return once nothing is on its way."""
        for each in self._take():
            each.pending.wait()
        for pending in self._others:
            pending.wait()
        self._others.clear()

    def _take(self) -> Iterator[_Arriving]:
        # One by one, so that what has been stored is freed.
        while self._arriving:
            yield self._arriving.pop(0)
