"""A request's hold on a context, which is not dropped meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from typing import Any, Self

from star_attention.serve.contexts.entry import ContextView


class Outcome(StrEnum):
    """What a request found.

    `HIT`: the context was there, on the device or on disk. `JOINED`: somebody else's request is
    having it encoded. `MISS`: it is encoded for this request.
    """

    HIT = "hit"
    JOINED = "joined"
    MISS = "miss"


class Lease:
    """Keeps a context until it is released; every lease must be.

    Attributes:
        id: the context's id.
        outcome: what the request found.
        reason: of a miss, why: "new", "input_changed" (a kept context begins alike),
            "beginning_changed" (one ends alike: a date before it, say), "evicted", "expired" or
            "failed"; "" otherwise.
        ready: resolves to the context on its device, or to why there is none. It may resolve on the
            engine's thread.
    """

    def __init__(
        self,
        id: str,
        outcome: Outcome,
        reason: str,
        *,
        view: Callable[[], ContextView],
        release: Callable[[Lease], None],
    ) -> None:
        self.id, self.outcome, self.reason = id, outcome, reason
        self.ready: Future[Any] = Future()
        self._view, self._release = view, release
        self._is_released = False

    def view(self) -> ContextView:
        """Return the context as it is now."""
        return self._view()

    def release(self) -> None:
        """Let the context go; safe to call more than once, from any thread."""
        if not self._is_released:
            self._is_released = True
            self._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
