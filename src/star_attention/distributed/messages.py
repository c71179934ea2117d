"""Python objects between ranks: rank 0 decides and broadcasts, or all ranks gather."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from star_attention import errors
from star_attention.distributed.following import CLOSE
from star_attention.distributed.streams import Suspendable
from star_attention.distributed.world import World
from star_attention.errors import InvalidInputError

# Kinds of messages: the first item of each tuple. Those of a forward: `hf/cache/mirrored.py`.
CALL = "call"
"""Kind of the message with which rank 0 starts a call."""

RESUME = "resume"
"""Kind of the message with which rank 0 goes on with a suspended stream, by its number."""

STREAM = "the rest of a stream"
"""What a rank that follows does after `RESUME`."""

SOURCES = "sources"
"""Kind of the message about a call of phase 2 that has its answers read once more: its number, and
the texts (`hf/execution/sources.py`)."""

END = "end"
"""Kind of the last message about a call of phase 2: its number, and the answers."""

BATCH = "batch"
"""Kind of the message about a batch of rows: its number, and what comes next
(`generation/batching/leading.py`)."""

# Bytes of a broadcast; a longer message takes a second one.
_PACKET = 2048
_LENGTH = 8


class WorldControl:
    """`Control` over the gloo group of all ranks of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.size
        self.contexts, self.engines = world.contexts, world.engines
        self.followers = world.followers
        self.streams = world.streams

    @contextmanager
    def collective(self, where: str, *, about: Any = None) -> Iterator[None]:
        """Run one public call on all ranks; an exception on one rank is raised on all of them.

        After an exception the ranks meet again, so that the next call finds them together.

        Args:
            where: name of the call, for errors and for ranks that follow.
            about: what it is a call of, the same on all ranks: an engine (`Runtime.reference`) or
                the key of a context.

        Raises:
            InvalidInputError: the ranks are in different calls, or in calls about different things.
            RankError: another rank died, hangs or failed.
        """
        with self.world.call(where) as outermost:
            if outermost:
                self._suspend_active(where)
                self._check_in(where, about)
            yield

    @contextmanager
    def streaming(self, stream: Suspendable, *, closing: bool = False) -> Iterator[None]:
        """Run steps of a stream on all ranks, as `collective` runs a call.

        Nothing is sent before them if the ranks' last steps were of the same stream.

        Args:
            stream: the stream on this rank.
            closing: True to end it: rank 0 need not resume it for that.
        """
        with self.world.call("a stream"):
            if stream.ended:
                yield
                return
            if self.streams.active is not stream:
                self._suspend_active("another stream")
                self._resume(stream, closing)
            try:
                yield
            except BaseException:
                # No later call resumes this stream.
                self.streams.active = None
                raise
            if stream.ended or stream.is_suspended:
                self.streams.active = None
            elif self.rank == 0:
                self.pause()

    def pause(self) -> None:
        """Note that rank 0's stream stops between two pieces, maybe for long."""

    def _suspend_active(self, where: str) -> None:
        active, self.streams.active = self.streams.active, None
        if active is not None and not active.ended and not active.suspend():
            raise self._different_calls("the stream of an answer", where)

    def _resume(self, stream: Suspendable, closing: bool) -> None:
        if not stream.is_suspended:
            raise InvalidInputError("this stream has failed; ask again")
        if self.rank == 0:
            if closing:
                return
            self.broadcast_object((RESUME, stream.number))
        else:
            message = self.receive_about(stream.number)
            if message is None:
                stream.leave()
                return
            if message[0] == END:
                stream.end(message[2])
                return
        stream.is_suspended = False
        self.streams.active = stream

    def _check_in(self, where: str, about: Any) -> None:
        if self.rank == 0:
            news = self.contexts.news(), self.streams.news()
            self.broadcast_object((CALL, where, about, news))
            return
        kind, *arguments = self._receive_but_ends(None)
        leading = arguments[0] if kind == CALL else "the stream of an answer"
        if leading != where:
            raise self._different_calls(leading, where)
        _, leading_about, news = arguments
        self.contexts.heed(news[0])
        self.streams.heed(news[1])
        if leading_about != about:
            raise InvalidInputError(
                f"rank {self.rank} calls {where} on another engine or context than rank 0, or with"
                " other settings of StarConfig; make the same calls on all ranks"
            )

    def _different_calls(self, leading: str, where: str) -> InvalidInputError:
        return InvalidInputError(
            f"rank 0 is in {leading}, rank {self.rank} in {where}: every call is collective, so"
            " make the same calls in the same order on all ranks"
        )

    def receive_about(self, number: int) -> Any:
        """Return rank 0's next message if it is about this call or batch; None if it is not.

        A message about another call is kept for the call that expects it.
        """
        message = self._receive_but_ends(number)
        if message[0] in (RESUME, SOURCES, END, BATCH) and message[1] == number:
            return message
        self.push_back(message)
        return None

    def _receive_but_ends(self, number: int | None) -> Any:
        """Return rank 0's next message, after the ends of streams other than `number`."""
        message = self.receive_object()
        while message[0] == END and message[1] != number:
            self.streams.end(*message[1:])
            message = self.receive_object()
        return message

    # ------------------------------------------------------------------ ranks that follow

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep this rank's part of every context for as long as rank 0 has its own."""
        with self.world.following():
            self.contexts.hold()
            self.streams.hold()
            try:
                yield
            finally:
                self.contexts.release()
                self.streams.release()

    def next_call(self) -> tuple[str, Any] | None:
        """Wait for rank 0's next call, which this rank then makes, too; None if it was the last.

        Waiting takes as long as it takes, on the CPU.

        Returns:
            Name of the call, and what it is about, as in `collective`; `STREAM` and the number of a
            stream that rank 0 continues.

        Raises:
            RankError: another rank died or was stopped.
        """
        message = self.world.await_call(partial(self._receive_but_ends, None))
        self.push_back(message)
        if message[0] != CALL:
            return STREAM, message[1]
        _, where, about, _ = message
        if where != CLOSE:
            return where, about
        with self.collective(CLOSE):
            return None

    def dismiss(self) -> None:
        """Let the ranks that follow go: `next_call` returns None there. On rank 0."""
        # Who is let go may end.
        self.world.watch_others(None)
        if self.rank == 0 and self.world.broken is None and self.followers.count():
            with self.collective(CLOSE):
                pass

    # ------------------------------------------------------------------ objects

    def broadcast_object(self, message: Any) -> None:
        """Send a message from rank 0 to all others: one small broadcast unless it is long."""
        data = pickle.dumps(message)
        packet = bytearray(_PACKET)
        packet[:_LENGTH] = len(data).to_bytes(_LENGTH, "little")
        packet[_LENGTH : _LENGTH + len(data)] = data[: _PACKET - _LENGTH]
        self._broadcast_bytes(torch.frombuffer(packet, dtype=torch.uint8))
        rest = data[_PACKET - _LENGTH :]
        if rest:
            self._broadcast_bytes(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def receive_object(self) -> Any:
        """Return rank 0's next message."""
        if self.world.early_message is not None:
            message, self.world.early_message = self.world.early_message, None
            return message
        packet = torch.empty(_PACKET, dtype=torch.uint8, device="cpu")
        self._broadcast_bytes(packet)
        raw = packet.numpy().tobytes()
        length = int.from_bytes(raw[:_LENGTH], "little")
        data = raw[_LENGTH : _LENGTH + length]
        if length > len(data):
            rest = torch.empty(length - len(data), dtype=torch.uint8, device="cpu")
            self._broadcast_bytes(rest)
            data += rest.numpy().tobytes()
        return pickle.loads(data)

    def push_back(self, message: Any) -> None:
        """Return a message that belongs to the next call; `receive_object` returns it first."""
        self.world.early_message = message

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark this rank as waiting for others, for however long; raise if one has a fault."""
        with self.world.waiting():
            yield
        self.world.tick()

    def _broadcast_bytes(self, data: Tensor) -> None:
        self.world.issue(self.world.everyone(), lambda group: group.broadcast(data, 0)).wait()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, on all ranks, in the order of ranks."""
        data = pickle.dumps(value)
        everyone = self.world.everyone()
        lengths = self.world.all_gather(torch.tensor([len(data)], device="cpu"), everyone)
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        parts = self.world.all_gather(padded, everyone)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def run_on_rank_0(self, decision: Callable[[], Any]) -> Any:
        """Return rank 0's result on every rank, or raise its exception on every rank."""
        if self.rank == 0:
            try:
                value = decision()
            except Exception as error:
                self.mark_collective(error)
                self.broadcast_object((False, _describe(error)))
                raise
            self.broadcast_object((True, value))
            return value
        succeeded, value = self.receive_object()
        if not succeeded:
            raise self.mark_collective(errors.rebuild(*value))
        return value

    def raise_if_any_failed(self, failure: Exception | None) -> None:
        """Raise the exception of the first rank that has one, on all ranks; None means success."""
        failures = self.gather(None if failure is None else _describe(failure))
        for rank, description in enumerate(failures):
            if description is None:
                continue
            if rank == self.rank:
                assert failure is not None
                raise self.mark_collective(failure)
            name, message, reasons = description
            raise self.mark_collective(errors.rebuild(name, message, reasons, rank))

    def mark_collective(self, error: Exception) -> Exception:
        """Mark an exception that all ranks raise here, so it is not reported to the others."""
        self.world.shared_error = error
        return error


def _describe(error: Exception) -> tuple[str, str, list[str] | None]:
    """Return the arguments for `errors.rebuild`."""
    return type(error).__name__, str(error), getattr(error, "reasons", None)
