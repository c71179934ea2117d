"""torch's process groups, our own: the default group is left alone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from star_attention.distributed.comm import Recording
from star_attention.distributed.rendezvous import dist, wait_for_ranks
from star_attention.distributed.sockets import SocketGroup

if TYPE_CHECKING:
    from torch import Tensor

    from star_attention.distributed.peers import PeerGroup

NARROW_NCCL = "nccl-narrow"
"""NCCL on few of the device's processors, for transfers beside computation.

A collective that waits for another rank spins, and keeps its processors from the computation.
"""
_NARROW_CTAS = 4
_NCCL = ("nccl", NARROW_NCCL)

Exchange = Callable[[str, str], list[str]]
"""Sends a text, under a key, to all members of a group, and returns theirs."""

PEERS = "peers"
"""Small tensors through GPU memory, by a `PeerGroup`."""

SOCKETS = "sockets"
"""Small tensors of CPU ranks of one host, by a `SocketGroup`."""

# The watchdog decides how long to wait, not the transport.
_FOREVER = timedelta(days=30)
# How long to wait for NCCL to end what runs on the device.
_ABORT_S = 5.0

# Bytes up to which ranks over gloo send their parts straight to each other.
_DIRECT_BYTES = 64 * 1024

# Groups with a collective that never ends: destroying one would wait for it.
_ABANDONED: list[Any] = []


def all_gather(group: Any, parts: Tensor, part: Tensor) -> Any:
    """Start gathering every member's part in `parts`, `[members, *shape]`; both are contiguous."""
    if isinstance(group, SocketGroup):
        return group.gather(parts, part)
    room, is_gloo = parts.view(-1), type(group).__name__ == "ProcessGroupGloo"
    if is_gloo and 0 < parts.numel() * parts.element_size() <= _DIRECT_BYTES:
        # Gloo's gather passes parts on from rank to rank; between two it is slower, too.
        copies = part.expand(parts.shape).reshape(-1)
        return group.alltoall_base(room, copies, [], [])
    return group._allgather_base(room, part.view(-1))


class ProcessGroups:
    """The groups of one rank, by transport and members, each made when it is first used.

    Making a group is collective among its members.

    Attributes:
        recordings: collectives that CUDA graphs hold.
    """

    def __init__(self, store: Any, name: str, rank: int, start_s: float) -> None:
        self._store = store
        self._name = name
        self._rank = rank
        self._start_s = start_s
        self._groups: dict[tuple[str, range], Any] = {}
        # Their buffers serve again after a fault.
        self._peers: dict[range, PeerGroup] = {}
        self.recordings: weakref.WeakSet[Recording] = weakref.WeakSet()

    def get(self, backend: str, ranks: range) -> Any | None:
        return self._groups.get((backend, ranks))

    def make(
        self, backend: str, ranks: range, *, epoch: int, check: Callable[[], None] | None = None
    ) -> Any:
        """Make the group of these ranks, of which this is one.

        Args:
            backend: "gloo", "nccl", `NARROW_NCCL`, `PEERS` or `SOCKETS`.
            epoch: recoveries so far; groups of different epochs do not meet.
            check: called while this rank waits for the others; may raise.
        """
        name = f"{self._name}/{epoch}/{backend}/{ranks.start}-{ranks.stop}-{ranks.step}"
        store, member = dist.PrefixStore(name, self._store), ranks.index(self._rank)
        # torch waits for the others inside the constructor, where neither Ctrl-C nor a fault of
        # theirs would end it: so wait here, until all are about to call it.
        store.set(f"here/{self._rank}", "")
        wait_for_ranks(store, {f"here/{rank}": rank for rank in ranks}, self._start_s, check)

        def exchange(key: str, text: str) -> list[str]:
            store.set(f"{key}/{self._rank}", text)
            keys = {f"{key}/{rank}": rank for rank in ranks}
            wait_for_ranks(store, keys, self._start_s, check)
            return [store.get(key).decode() for key in keys]

        group: Any
        if backend == PEERS:
            group = self._connected_peers(ranks, exchange)
        elif backend == SOCKETS:
            group = self._connected_sockets(ranks, exchange)
        elif backend in _NCCL:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _FOREVER
            if backend == NARROW_NCCL:
                options.config.max_ctas = _NARROW_CTAS
            group = dist.ProcessGroupNCCL(store, member, len(ranks), options)
        else:
            timeout = timedelta(seconds=self._start_s)
            group = dist.ProcessGroupGloo(store, member, len(ranks), timeout)
            group._set_default_timeout(_FOREVER)
        self._groups[backend, ranks] = group
        return group

    def _connected_peers(self, ranks: range, exchange: Exchange) -> PeerGroup:
        from star_attention.distributed.cuda_memory import CudaMemory
        from star_attention.distributed.peers import PeerGroup

        if ranks not in self._peers:
            self._peers[ranks] = PeerGroup(ranks.index(self._rank), len(ranks), CudaMemory())
        self._peers[ranks].connect(exchange)
        return self._peers[ranks]

    def _connected_sockets(self, ranks: range, exchange: Exchange) -> SocketGroup:
        group = SocketGroup(ranks.index(self._rank), len(ranks))
        group.connect(exchange)
        return group

    def abort(self) -> None:
        """End collectives that run on the device, where nothing else would notice a fault."""
        ending = []
        for (backend, _), group in list(self._groups.items()):
            if backend == PEERS:
                group.abort()
            elif backend in _NCCL:
                # NCCL ends its kernels, and then waits until no graph holds them.
                ending.append(threading.Thread(target=_abort, args=(group,), daemon=True))
                ending[-1].start()
        for recording in list(self.recordings):
            recording.release()
        for thread in ending:
            thread.join(_ABORT_S)

    def abandon(self) -> None:
        """Keep all groups alive to the end of the process: a collective of theirs may never end."""
        _ABANDONED.extend(self._groups.values())

    def clear(self) -> None:
        """Leave all groups."""
        for (backend, _), group in self._groups.items():
            if backend == SOCKETS:
                group.close()
        self._groups.clear()


def _abort(group: Any) -> None:
    # It may be aborted already.
    with suppress(RuntimeError):
        group.abort()
