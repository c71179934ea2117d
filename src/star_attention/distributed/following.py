"""Which ranks follow rank 0: they wait for its calls, and make them too (`StarLLM.follow`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from star_attention.distributed.rendezvous import dist
from star_attention.errors import RankError, first_line

FOLLOW = "follow"
"""What a rank does that waits for rank 0's next call, in errors."""

CLOSE = "close"
"""Name of the call with which rank 0 lets the other ranks go."""

# How long rank 0 waits at its end for ranks that do not follow yet, after the last sign of them.
_LINGER_S = 2.0

_COUNT = "following"


class Followers:
    """The number of ranks that follow, in the store that all ranks share."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Count this rank as one that follows.

        Raises:
            RankError: the store is gone, and rank 0 with it.
        """
        try:
            self._store.add(_COUNT, 1)
        except dist.DistError as error:
            cause = f"its store is unreachable: it ended before this rank ({first_line(error)})"
            raise RankError(0, FOLLOW, cause) from error
        yield
        # After a fault nobody counts any more, and an unreachable store would not answer for long.
        try:
            self._store.add(_COUNT, -1)
        except dist.DistError:
            # Rank 0 has gone, and nobody counts any more.
            return

    def count(self) -> int:
        """Return how many ranks follow."""
        try:
            return int(self._store.add(_COUNT, 0))
        except dist.DistError:
            return 0

    def come(
        self, others: Callable[[], int], moved_at: Callable[[], float], limit_s: float
    ) -> None:
        """Wait until all other ranks follow, or a moment after the last sign of those that do not.

        Args:
            others: returns how many other ranks have not left for good.
            moved_at: returns when one that does not follow yet was last seen to move, on the clock
                of `time.monotonic`.
            limit_s: longest wait, in seconds.
        """
        began = time.monotonic()
        while self.count() < others():
            now = time.monotonic()
            if now - max(began, moved_at()) > _LINGER_S or now - began > limit_s:
                return
            time.sleep(0.01)
