"""Pauses between two pieces of a stream that rank 0 leads alone.

On devices the ranks that follow wait for the next step inside a collective, which keeps a GPU busy.
Where the reader of a stream pauses, rank 0 suspends it, so that they wait on the CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

PAUSE_S = 1.0
"""Seconds after a piece until the stream is suspended."""


class Pauses:
    """Ends the last pause in a thread, unless a call comes before.

    Args:
        lock: held by whoever is in a call.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._pause: tuple[float, Callable[[], None]] | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def begin(self, suspend: Callable[[], None]) -> None:
        """Begin a pause; `suspend` is called in another thread if it lasts."""
        self._pause = (time.monotonic(), suspend)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._watch, name="star-attention-pauses", daemon=True
            )
            self._thread.start()

    def cancel(self) -> None:
        """End the pause, because a call begins."""
        self._pause = None

    def close(self) -> None:
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(PAUSE_S / 4):
            pause = self._pause
            if pause is None or time.monotonic() - pause[0] < PAUSE_S:
                continue
            with self._lock:
                if self._pause is pause:
                    self._pause = None
                    # A fault of the ranks is raised by the next call, too.
                    with suppress(Exception):
                        pause[1]()
