"""How blocks travel that other ranks look back to: an exchange per layer and round.

As soon as a layer has stored a stripe's keys and values, each rank sends the end of its stripe to
the ranks that look back to it, and goes on with attention inside its own blocks. The anchor comes
along in the first round: a broadcast of its own, beside the exchange, could wait for it.

Axes: B contexts, G KV heads, S tokens, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from star_attention.distributed.comm import Comm, Pending
from star_attention.hf.cache.encode import KVLink, Piece, Recent, write_kept
from star_attention.hf.cache.links import Place, Places, pack, unpack
from star_attention.planning.exchange import Transfer, in_round
from star_attention.planning.plan import BlockPlan, Span
from star_attention.storage.kv import ContextKV

_LAYERS_IN_FLIGHT = 2
"""Most exchanges under way, each of which holds what it sends and receives."""

Read = Callable[[int, int], tuple[Tensor, Tensor]]
"""Returns keys and values of the tokens from the first number to before the second."""


@dataclass(kw_only=True)
class LayerExchange:
    """One layer's exchange under way.

    Attributes:
        layer: index of the layer.
        place: shape and device of its keys and values.
        batch: number of contexts.
        transfers: what this rank receives, in the order in which it arrives.
        received: room for that.
        pending: the collective.
    """

    layer: int
    place: Place
    batch: int
    transfers: list[Transfer]
    received: Tensor
    pending: Pending

    def pieces(self) -> Iterator[Piece]:
        """Wait, and yield what has arrived."""
        self.pending.wait()
        shape, at = self.place.shape, 0
        for transfer in self.transfers:
            elements = self.batch * transfer.tokens * shape.elements
            part = self.received[at : at + elements]
            yield transfer.start, *unpack(part, shape, self.batch, transfer.tokens)
            at += elements


def begin(
    comm: Comm,
    transfers: Sequence[Transfer],
    read: Read,
    *,
    layer: int,
    place: Place,
    batch: int = 1,
    ranks: int | None = None,
) -> LayerExchange:
    """Start a layer's exchange. Collective.

    Args:
        comm: the ranks.
        transfers: those of all ranks, sorted.
        read: reads what this rank sends.
        layer: index of the layer.
        place: shape and device of its keys and values.
        batch: number of contexts.
        ranks: the first cp ranks, which take part; None for all.
    """
    leaving = [transfer for transfer in transfers if transfer.source == comm.cp_rank]
    arriving = [transfer for transfer in transfers if transfer.target == comm.cp_rank]
    parts = [pack(*read(transfer.start, transfer.stop)) for transfer in leaving]
    sent = torch.cat(parts) if parts else place.room(0)
    received = place.room(batch * sum(transfer.tokens for transfer in arriving))
    elements = batch * place.shape.elements
    pending = comm.exchange(
        sent,
        received,
        sent=_sums(leaving, [transfer.target for transfer in leaving], elements),
        arriving=_sums(arriving, [transfer.source for transfer in arriving], elements),
        total=elements * sum(transfer.tokens for transfer in transfers),
        ranks=ranks,
        # Beside attention.
        narrow=True,
    )
    return LayerExchange(
        layer=layer,
        place=place,
        batch=batch,
        transfers=arriving,
        received=received,
        pending=pending,
    )


def _sums(transfers: list[Transfer], others: list[int], elements: int) -> dict[int, int]:
    """Return the elements of the transfers with each other rank."""
    sums = dict.fromkeys(others, 0)
    for transfer, other in zip(transfers, others, strict=True):
        sums[other] += elements * transfer.tokens
    return sums


class StripeLink(KVLink):
    """Exchanges what stripes look back to, and the anchor, in the step of all ranks."""

    def __init__(
        self,
        comm: Comm,
        plan: BlockPlan,
        places: Places,
        windows: list[int | None],
        *,
        recents: list[Recent],
        anchors: list[ContextKV],
        sends_anchor: bool,
        batch: int,
    ) -> None:
        """Prepare the rounds.

        Args:
            comm: the ranks.
            plan: the blocks, in stripes.
            places: the layers that store keys and values.
            windows: sliding window of each layer in tokens, None for full attention.
            recents: for each layer, where blocks arrive.
            anchors: where the anchor arrives on ranks other than 0, one store for each context.
            sends_anchor: True if rank 0 sends the anchor.
            batch: number of contexts.
        """
        stripes = plan.stripes
        assert stripes is not None
        self._comm, self._plan, self._places = comm, plan, places
        self._recents, self._batch = recents, batch
        self._anchors, self._sends_anchor = anchors, sends_anchor
        self._rounds = stripes.rounds
        starts = [start for start, _ in stripes.of_rank(comm.cp_rank)]
        self._round_of = {start: number for number, start in enumerate(starts)}
        self._lookbacks, self._windows = plan.lookbacks(len(windows)), windows
        # The same for all layers that look back, with one window, and for all others.
        self._transfers = cache(partial(in_round, plan, anchor=sends_anchor))
        self._under_way: deque[LayerExchange] = deque()

    def send(self, layer: int, span: Span, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        # Nobody reads a short last block, which is a forward of its own, from another rank.
        number = self._round_of.get(span.start)
        if number is not None:

            def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
                part = slice(start - span.start, stop - span.start)
                return k_BGSD[:, :, part], v_BGSD[:, :, part]

            self._begin(number, layer, read)

    def wait_for(self, layer: int) -> None:
        while any(exchange.layer == layer for exchange in self._under_way):
            self._receive_first()

    def finish(self) -> None:
        # Without a stripe in the last round, a rank still takes part: in the same group of ranks.
        for number in range(len(self._round_of), self._rounds):
            for layer in self._places:
                self._begin(number, layer, _nothing)
        while self._under_way:
            self._receive_first()

    def _begin(self, number: int, layer: int, read: Read) -> None:
        """Start a layer's exchange in a round."""
        transfers = self._transfers(number, self._lookbacks[layer], self._windows[layer])
        if not transfers:
            return
        while len(self._under_way) >= _LAYERS_IN_FLIGHT:
            self._receive_first()
        self._under_way.append(
            begin(
                self._comm,
                transfers,
                read,
                layer=layer,
                place=self._places[layer],
                batch=self._batch,
                ranks=self._plan.busy_ranks,
            )
        )

    def _receive_first(self) -> None:
        exchange = self._under_way.popleft()
        for piece in exchange.pieces():
            self._recents[exchange.layer].add(*piece)
            if self._sends_anchor:
                keep_anchor(piece, self._anchors, exchange.layer, self._plan.anchor_size)


def keep_anchor(piece: Piece, anchors: list[ContextKV], layer: int, anchor_size: int) -> None:
    """Store what a piece has of the anchor of each context."""
    start, k_BGSD, v_BGSD = piece
    if anchors and start < anchor_size:
        part = slice(anchor_size - start)
        stores = [store.layers[layer] for store in anchors]
        write_kept(stores, start, k_BGSD[:, :, part], v_BGSD[:, :, part])


def _nothing(start: int, stop: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("a rank without a stripe has nothing to send")
