"""Ranks of one host that send each other small CPU tensors themselves, through Unix sockets.

In gloo every transfer passes through a thread of its own on each rank, which has to be woken up;
for a few kilobytes that takes several times as long as the transfer. Here the thread that waits
moves the bytes itself. The kernel orders them, so nothing depends on the processor's memory model,
and a rank that dies closes its sockets.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from star_attention.errors import first_line

_log = logging.getLogger("star_attention")

MOST_BYTES = 2 * 1024**2
"""Bytes of a part up to which this was seen to be faster than gloo."""

_YIELDS_S = 2e-3
"""Seconds for which a rank that waits only lets other processes have its processor. Then it sleeps,
and takes longer to go on: it may be woken up on the processor of the sender, which still works."""

_NUMBER_BYTES = 4
_CLOSED = "a rank closed its connection"


class SocketGroup:
    """Some ranks of one host, as one of them sees them, with a socket between each two.

    Members start the same operations in the same order, with tensors of the same shape, and wait
    for each before they start the next.

    Attributes:
        usable: True if all members are connected.
    """

    def __init__(self, member: int, size: int) -> None:
        """Prepare to connect.

        Args:
            member: number of this rank among them.
        """
        self.usable = False
        self._member, self._size = member, size
        self._sockets: dict[int, socket.socket] = {}
        self._finalizer = weakref.finalize(self, _close, self._sockets)

    def connect(self, exchange: Callable[[str, str], list[str]]) -> None:
        """Connect all members, or none of them. Collective.

        Args:
            exchange: sends a text, under a key, to all members, and returns theirs.
        """
        # Nobody but this user can enter the folder, and it is gone when all have connected.
        with tempfile.TemporaryDirectory(prefix="star-") as folder:
            path = Path(folder) / "socket"
            with socket.socket(socket.AF_UNIX) as listener:
                listening = _attempt(lambda: _listen(listener, path, self._size))
                paths = exchange("paths", listening)
                # Members of a higher number connect to those of a lower one.
                called = _attempt(lambda: self._call(paths)) if all(paths) else ""
                accepted = all(exchange("called", called)) and bool(
                    _attempt(lambda: self._accept(listener))
                )
        self.usable = all(exchange("connected", "yes" if accepted else ""))
        if not self.usable:
            self.close()

    def _call(self, paths: list[str]) -> str:
        for member, path in enumerate(paths[: self._member]):
            self._sockets[member] = caller = socket.socket(socket.AF_UNIX)
            caller.connect(path)
            caller.sendall(self._member.to_bytes(_NUMBER_BYTES, "little"))
            caller.setblocking(False)
        return "called"

    def _accept(self, listener: socket.socket) -> str:
        # All have called by now, and sent their numbers.
        for _ in range(self._size - 1 - self._member):
            caller, _ = listener.accept()
            number = caller.recv(_NUMBER_BYTES, socket.MSG_WAITALL)
            self._sockets[int.from_bytes(number, "little")] = caller
            caller.setblocking(False)
        return "connected"

    def close(self) -> None:
        """Close the connections; members that wait for this rank fail."""
        self._finalizer()

    # ------------------------------------------------------------------ operations

    def gather(self, parts: Tensor, part: Tensor) -> Exchange:
        """Start gathering all members' parts in `parts`, `[size, *shape]`; both are contiguous."""
        arriving, sent = _bytes(parts), _bytes(part)
        size = len(sent)
        arriving[self._member * size : (self._member + 1) * size] = sent
        return Exchange(
            [(other, sent) for other in self._sockets.values()],
            [
                (other, arriving[member * size : (member + 1) * size])
                for member, other in self._sockets.items()
            ],
        )

    def broadcast(self, tensor: Tensor, root: int) -> Exchange:
        """Start overwriting a contiguous tensor with the first member's, `root` 0."""
        assert root == 0
        data = _bytes(tensor)
        if self._member == 0:
            return Exchange([(other, data) for other in self._sockets.values()], [])
        return Exchange([], [(self._sockets[0], data)])


class Exchange:
    """Bytes that move between this rank and others while it waits for them.

    Args:
        sent: what goes to whom.
        arriving: room for what comes from whom.
    """

    def __init__(
        self,
        sent: Iterable[tuple[socket.socket, memoryview]],
        arriving: Iterable[tuple[socket.socket, memoryview]],
    ) -> None:
        self._sent = [(other, data) for other, data in sent if data]
        self._arriving = [(other, room) for other, room in arriving if room]
        self._failed = False

    def is_completed(self) -> bool:
        """Return True if it has failed, or nothing is left to move."""
        return self._failed or not (self._sent or self._arriving)

    def wait(self, timeout: timedelta) -> None:
        """Move the bytes.

        Raises:
            RuntimeError: it takes longer than `timeout`, or a rank has closed its connection.
        """
        try:
            self._finish(time.monotonic() + timeout.total_seconds())
        except OSError as error:
            self._failed = True
            raise RuntimeError(f"{_CLOSED} ({first_line(error)})") from error

    def _finish(self, deadline: float) -> None:
        idle_since = time.monotonic()
        while True:
            moved = self._send() + self._receive()
            if self.is_completed():
                return
            now = time.monotonic()
            if moved:
                idle_since = now
            elif now - idle_since < _YIELDS_S:
                os.sched_yield()
            elif now > deadline:
                raise RuntimeError("the other ranks are late")
            else:
                self._sleep(deadline - now)

    def _send(self) -> int:
        moved = 0
        for index in reversed(range(len(self._sent))):
            other, data = self._sent[index]
            try:
                count = other.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
            moved += count
            if count == len(data):
                del self._sent[index]
            else:
                self._sent[index] = other, data[count:]
        return moved

    def _receive(self) -> int:
        moved = 0
        for index in reversed(range(len(self._arriving))):
            other, room = self._arriving[index]
            try:
                count = other.recv_into(room)
            except BlockingIOError:
                continue
            if not count:
                raise ConnectionError("nothing more comes")
            moved += count
            if count == len(room):
                del self._arriving[index]
            else:
                self._arriving[index] = other, room[count:]
        return moved

    def _sleep(self, seconds: float) -> None:
        events: dict[int, int] = {}
        for other, _ in self._arriving:
            events[other.fileno()] = select.POLLIN
        for other, _ in self._sent:
            events[other.fileno()] = events.get(other.fileno(), 0) | select.POLLOUT
        poll = select.poll()
        for descriptor, wanted in events.items():
            poll.register(descriptor, wanted)
        poll.poll(seconds * 1000)


def _attempt(step: Callable[[], str]) -> str:
    """Return the step's result, and "" if it failed: then all members fall back on gloo."""
    try:
        return step()
    except OSError as error:
        _log.info("no sockets between the ranks: %s", first_line(error))
        return ""


def _listen(listener: socket.socket, path: Path, size: int) -> str:
    listener.bind(str(path))
    listener.listen(size)
    return str(path)


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _close(sockets: dict[int, socket.socket]) -> None:
    while sockets:
        sockets.popitem()[1].close()
