"""The mesh of ranks: who shares what with whom, its groups, its progress and its traffic."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from star_attention.attention.kernels import triton_works
from star_attention.distributed.comm import Recording
from star_attention.distributed.following import CLOSE
from star_attention.distributed.groups import NARROW_NCCL, PEERS, SOCKETS
from star_attention.distributed.messages import WorldControl
from star_attention.distributed.sockets import MOST_BYTES, SocketGroup
from star_attention.distributed.streams import Suspendable
from star_attention.distributed.world import World
from star_attention.planning.traffic import Traffic

if TYPE_CHECKING:
    from star_attention.distributed.peers import PeerGroup


def host_of(device: torch.device) -> str:
    """Return a name that ranks have in common if they may reach each other without torch's groups.

    GPUs do in Triton's kernels, CPUs through sockets. "" if this rank does not.
    """
    if device.type == "cuda":
        return _boot_id() if triton_works(device) else ""
    try:
        # A container with a network of its own is a host of its own.
        network = os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
    return f"{_boot_id()} {network}"


def _boot_id() -> str:
    """Return a name that processes have in common if they run on one machine; "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Mesh(WorldControl):
    """The ranks of a world in a mesh of `cp_size` rows of `tp_size` ranks each.

    A lane holds the cp ranks that have the same heads, a row the tp ranks of one cp rank.
    """

    def __init__(
        self,
        world: World,
        *,
        tp_size: int,
        backend: str,
        device: torch.device | None,
        hosts: list[str] | None,
    ) -> None:
        """Arrange the ranks. `collectives.MeshComm` documents the arguments."""
        super().__init__(world)
        self.tp_size = tp_size
        self.cp_size = world.size // tp_size
        self.cp_rank, self.tp_rank = divmod(world.rank, tp_size)
        self.backend = backend
        self.is_asynchronous = backend == "nccl"
        self.cp_traffic, self.tp_traffic = Traffic(), Traffic()
        self._device = device or torch.device("cpu")
        self.gpus_on_one_host = False
        # `host_of` of every rank.
        self._hosts = hosts or [""] * world.size
        self._connected_version = -1
        self._rehearsing = False

    # ------------------------------------------------------------------ groups

    def _lane(self, ranks: int | None = None) -> range:
        """Return the first `ranks` cp ranks that hold this rank's heads."""
        stop = self.tp_rank + self.tp_size * ((ranks or self.cp_size) - 1) + 1
        return range(self.tp_rank, stop, self.tp_size)

    def _row(self) -> range:
        """Return the tp ranks that share this rank's cp rank."""
        first = self.cp_rank * self.tp_size
        return range(first, first + self.tp_size)

    def _group(self, ranks: range, *, narrow: bool = False) -> Any:
        """Return these ranks' process group.

        Args:
            narrow: take a transport that leaves the device to computation.
        """
        backend = NARROW_NCCL if narrow and self.backend == "nccl" else self.backend
        return self.world.group(backend, ranks)

    def _group_of_few(self, ranks: range, bytes: int) -> Any:
        """Return these ranks' group for tensors of so many bytes, which may be few."""
        sockets = self._sockets(ranks) if bytes <= MOST_BYTES else None
        return sockets or self._group(ranks)

    def _sockets(self, ranks: range) -> SocketGroup | None:
        """Return the group of these CPU ranks in which they send by themselves."""
        sockets: SocketGroup | None = self.world.groups.get(SOCKETS, ranks)
        is_usable = self.backend != "nccl" and sockets is not None and sockets.usable
        return sockets if is_usable else None

    def _peers(self, ranks: range) -> PeerGroup | None:
        """Return the group of these ranks in which they reach each other's GPU memory."""
        peers: PeerGroup | None = self.world.groups.get(PEERS, ranks)
        return peers if peers is not None and peers.usable else None

    @property
    def one_host(self) -> bool:
        """True if small tensors are quickly exchanged: see `Comm`."""
        return self.gpus_on_one_host or self._sockets(self._lane()) is not None

    @contextmanager
    def collective(self, where: str, *, about: Any = None) -> Iterator[None]:
        """See `WorldControl.collective`; the call finds all groups connected."""
        with super().collective(where, about=about):
            # Rank 0 leaves from another mesh, maybe before any call in this one.
            if where != CLOSE:
                self._reconnect()
            yield

    @contextmanager
    def streaming(self, stream: Suspendable, *, closing: bool = False) -> Iterator[None]:
        """See `WorldControl.streaming`; steps find all groups connected."""
        with super().streaming(stream, closing=closing):
            if not (closing or stream.ended):
                self._reconnect()
            yield

    def _reconnect(self) -> None:
        if self._connected_version != self.transport_version:
            self._connect()
            self._connected_version = self.transport_version

    def _connect(self) -> None:
        """Connect ranks of one host, and what a CUDA graph that is captured later could not."""
        lane, row, everyone = self._lane(), self._row(), range(self.size)
        for ranks in dict.fromkeys((lane, row, everyone)):
            if len(ranks) == 1:
                continue
            if len({self._hosts[rank] for rank in ranks}) == 1 and self._hosts[self.rank]:
                self.world.group(PEERS if self.backend == "nccl" else SOCKETS, ranks)
            if self.backend == "nccl" and (ranks in (lane, row) or self._peers(ranks) is None):
                # NCCL connects in its first collective.
                self.world.issue(self._group(ranks), self._greet).wait()

    def _greet(self, group: Any) -> Any:
        return group.broadcast(torch.zeros(1, device=self._device), 0)

    @property
    def transport_version(self) -> int:
        """Changes when the groups are made again: graphs that hold the old ones are void."""
        return self.world.watchdog.epoch

    # ------------------------------------------------------------------ pauses

    def pause(self) -> None:
        """Let the ranks that follow wait for the next piece on the CPU, if that takes long."""
        if self.is_asynchronous:
            self.world.pauses.begin(self._suspend_stream)

    def _suspend_stream(self) -> None:
        if not self.followers.count():
            return
        if self._device.type == "cuda":
            # A thread starts on the first GPU.
            torch.cuda.set_device(self._device)
        with self.world.call("a pause"):
            self._suspend_active("a pause")

    # ------------------------------------------------------------------ progress

    def tick(self, where: str | None = None) -> None:
        """Report progress (a layer, a step), and what the rank does from now on.

        Raises:
            RankError: another rank died or hangs. Its exception, if it raised one.
        """
        self.world.tick(where)

    def progress(self, done: int, total: int) -> None:
        """Report how many tokens of its share of phase 1 this rank has done."""
        self.world.watchdog.share = (done, total)

    def working(self, what: str) -> AbstractContextManager[None]:
        """Return a block of work without reports, like compiling: CPU time is progress in it.

        Args:
            what: what the rank does, for messages.
        """
        return self.world.watchdog.working(what)

    def rank_status(self) -> list[dict[str, Any]]:
        """Return what each rank last reported: `where`, `state`, `done` and `total` tokens."""
        return list(self.world.watchdog.statuses)

    def watch_others(self, change: int) -> None:
        """Let rank 0 look after the ranks that follow while it is idle; `change` is 1 or -1."""
        self.world.watch_others(change)

    def check(self) -> None:
        """Raise an error if another rank is lost, between two calls of rank 0.

        Raises:
            RankError: it died, hangs or failed.
        """
        with self.world.call("a look at the ranks"):
            self.world.tick()

    @property
    def shared_error(self) -> BaseException | None:
        """The last exception that all ranks raised in the same place."""
        return self.world.shared_error

    # ------------------------------------------------------------------ graphs

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Let collectives return tensors of the right shape without any other rank.

        For the warm-up of a forward: other ranks may not run one at the same time. Nothing is
        counted. Values of other ranks are missing in the results.
        """
        before, self._rehearsing = self._rehearsing, True
        try:
            yield
        finally:
            self._rehearsing = before

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Yield the count of the block's collectives, which a CUDA graph captures.

        Capturing moves no bytes, so the block itself is not counted; `Recording.replayed` counts
        one replay.
        """
        cp, tp = self.cp_traffic, self.tp_traffic
        watchdog, issued = self.world.watchdog, self.world.watchdog.issued
        self.cp_traffic, self.tp_traffic = Traffic(), Traffic()
        recording = Recording()
        self.world.groups.recordings.add(recording)
        try:
            yield recording
            cp_replayed, tp_replayed = self.cp_traffic, self.tp_traffic
            count = watchdog.issued - issued

            def replayed() -> None:
                self.cp_traffic.add(cp_replayed.bytes, cp_replayed.calls)
                self.tp_traffic.add(tp_replayed.bytes, tp_replayed.calls)
                watchdog.issued += count

            recording.count = replayed
        finally:
            self.cp_traffic, self.tp_traffic = cp, tp
            watchdog.issued = issued
