"""Streams of answers between two pieces, while their ranks make other calls.

The *active* stream is the one whose next step all ranks run without a message. Before any other
call rank 0 suspends it, in place of its next step; a message resumes it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol


class Suspendable(Protocol):
    """A stream on one rank.

    Attributes:
        number: the same on all ranks.
        is_suspended: True until the stream is resumed; a new stream begins suspended.
        ended: True once it needs nothing from other ranks.
    """

    number: int
    is_suspended: bool

    @property
    def ended(self) -> bool: ...

    def suspend(self) -> bool:
        """Suspend the stream with all other ranks; return False if rank 0 continues it."""

    def repeat(self) -> None:
        """Take part in steps until rank 0 suspends the stream or it ends."""

    def leave(self) -> None:
        """End the stream on this rank, because rank 0 is elsewhere."""

    def end(self, answers: Any) -> None:
        """Take rank 0's answers."""


class Streams:
    """The streams of one rank.

    Attributes:
        active: the stream that can be continued without a message, if any.
    """

    def __init__(self) -> None:
        self.active: Suspendable | None = None
        self._numbers = itertools.count(1)
        self._known: weakref.WeakValueDictionary[int, Suspendable] = weakref.WeakValueDictionary()
        # On ranks that follow, where nothing else keeps a stream.
        self._held: dict[int, Suspendable] | None = None

    def new_number(self) -> int:
        """Return a number for rank 0's next call."""
        return next(self._numbers)

    def add(self, stream: Suspendable) -> None:
        """Note a stream, so that a message about it finds it."""
        self._known[stream.number] = stream
        if self._held is not None:
            self._held[stream.number] = stream

    def get(self, number: Any) -> Suspendable | None:
        """Return a stream, if it still exists on this rank."""
        return self._known.get(number)

    def end(self, number: int, answers: Any) -> None:
        """Pass rank 0's answers to a stream, if it still exists on this rank."""
        stream = self.get(number)
        if stream is not None:
            stream.end(answers)

    # Ranks that follow keep a stream for as long as rank 0 may continue it.

    def hold(self) -> None:
        """Keep the streams that follow, until `release`."""
        self._held = {}

    def release(self) -> None:
        self._held = None

    def news(self) -> list[int]:
        """Return the streams that rank 0 may continue."""
        return [number for number, stream in self._known.items() if not stream.ended]

    def heed(self, news: list[int]) -> None:
        """Drop what was held and is not among rank 0's."""
        if self._held is not None:
            self._held = {n: stream for n, stream in self._held.items() if n in news}
