"""Where texts become token ids: short ones in the event loop, others in threads beside it."""

from __future__ import annotations

import asyncio
import copy
import functools
import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

from star_attention.engine import StarLLM

_T = TypeVar("_T")
LONG_CHARACTERS = 64 * 1024
"""Characters of a request from which on its text is read in the lane of long ones."""
_FEW_CHARACTERS = 2048
"""Characters that are read where they are, in 1 to 2 ms: two threads would have to wake for them,
and each waits until another one lets go of Python."""
MESSAGE_CHARACTERS = 256
"""Characters that take as long as a message does, however short: templates go through them all."""
_QUICK_S = 0.003
"""Seconds that streams may wait while a text is read where it is."""
_SHARE = 100
"""Texts that take longer than that may have one part in so many of the event loop's time."""


class Lanes:
    """Threads in which texts become token ids, each with a tokenizer of its own.

    A tokenizer takes one thread at a time, and a book must not keep a short question waiting.
    Nobody knows how long a chat template takes: few characters are read in the event loop as long
    as others of their kind were quick, and not the first ones.

    Args:
        star: the engine.
    """

    def __init__(self, star: StarLLM) -> None:
        self.lanes = [
            (reader_of(star), ThreadPoolExecutor(1, thread_name_prefix=f"star-text-{name}"))
            for name in ("short", "long")
        ]
        # Held by who uses the tokenizer of short texts.
        self._short = threading.Lock()
        # When few characters of a kind may be read where they are, by the monotonic clock; not
        # before some have been read.
        self._quick_from: dict[Hashable, float] = {}
        # Of a schema nobody knows how long it takes.
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="star-text-check")
        self._checker: StarLLM | None = None

    async def run(
        self,
        characters: int,
        function: Callable[[StarLLM], _T],
        *,
        kept: int = 0,
        kind: Hashable = None,
    ) -> _T:
        """Return what a function returns for an engine whose tokenizer it may use.

        Args:
            characters: those that it reads.
            function: what reads them.
            kept: characters of a kept context that it goes through, too.
            kind: one of a few, for what takes about as long.
        """
        is_long = characters >= LONG_CHARACTERS
        star, lane = self.lanes[is_long]
        if characters + kept > _FEW_CHARACTERS:
            work = functools.partial(function, star)
        else:
            work = functools.partial(self._timed, function, star, kind)
            if self._is_quick(kind) and self._short.acquire(blocking=False):
                try:
                    return work()
                finally:
                    self._short.release()

        def locked() -> _T:
            with nullcontext() if is_long else self._short:
                return work()

        return await asyncio.get_running_loop().run_in_executor(lane, locked)

    def _is_quick(self, kind: Hashable) -> bool:
        return time.monotonic() >= self._quick_from.get(kind, math.inf)

    def _timed(self, function: Callable[[StarLLM], _T], star: StarLLM, kind: Hashable) -> _T:
        """Return what a function returns, and note how long it computes."""
        # Without the time in which other threads have Python.
        began = time.thread_time()
        try:
            return function(star)
        finally:
            took, now = time.thread_time() - began, time.monotonic()
            pause = took * _SHARE if took > _QUICK_S else 0.0
            self._quick_from[kind] = max(self._quick_from.get(kind, now), now + pause)

    async def check(self, options: dict[str, Any]) -> None:
        """Raise what `generate` would raise for options; the schema among them is compiled."""
        if "json_schema" not in options:
            # It tokenizes nothing: to wait for a thread would take longer.
            self.lanes[0][0].check_settings(**options)
            return
        # A tokenizer is copied where nobody else uses it, which takes long for a large one.
        if self._checker is None:
            self._checker = await self.run(_FEW_CHARACTERS + 1, reader_of)
        check = functools.partial(self._checker.check_settings, **options)
        await asyncio.get_running_loop().run_in_executor(self._checks, check)

    def close(self) -> None:
        """End the threads."""
        for lane in (*(lane for _, lane in self.lanes), self._checks):
            lane.shutdown(wait=False, cancel_futures=True)


def reader_of(star: StarLLM) -> StarLLM:
    """Return an engine over the same model with a tokenizer of its own."""
    reader = star.with_config()
    reader.tokenizer = copy.deepcopy(star.tokenizer)
    return reader
