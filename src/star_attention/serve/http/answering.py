"""The answers of one request: awaited as a whole, or sent as events while they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from star_attention.generation.result import Delta, Generation
from star_attention.hf.text.calls import CallHolder
from star_attention.serve.engine import Engine
from star_attention.serve.http.events import comment
from star_attention.serve.http.line import Line
from star_attention.serve.http.objects import Shape, Usage
from star_attention.serve.http.problems import of_error, timed_out
from star_attention.serve.http.tools import Answer, Call
from star_attention.serve.jobs import Choice, EngineEndedError, Job, failed
from star_attention.serve.metrics import Metrics
from star_attention.serve.settings import ServeSettings

_LOOK_S = 5.0
"""Seconds after which a request looks whether the engine still lives."""
OPENING_S = 0.004
"""Most seconds until a stream opens."""
PROGRESS_S = 1.0
"""Seconds between two chunks with progress, for clients that ask for them."""

Locate = Callable[[Generation], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What finds the calls of tools in answers.

    Attributes:
        holder: returns what holds them back from the text of an answer.
        read: returns those of an answer that has ended.
    """

    holder: Callable[[], CallHolder]
    read: Callable[[Generation], Awaitable[tuple[Call, ...]]]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Tokens of one prompt.

    Attributes:
        prompt: all of them.
        context: those of its context.
        cached: those that were encoded before.
        said: others, which a conversation has kept.
        kept: True if its context is kept.
    """

    prompt: int
    context: int
    cached: int
    kept: bool
    said: int = 0


class Answering:
    """The jobs of one request.

    Args:
        engine: does them.
        jobs: one for each prompt; they share `changed`.
        counts: of each prompt.
        shape: how answers look.
        settings: times of the server.
        metrics: notes how they end.
        request_id: for errors of defects.
        sources: returns the sources of an answer, with the id of its context, as JSON values; None
            if none are wanted.
        calls: finds calls of tools; None where there are no tools.
        line: where the pieces of a stream go as they come; None to have them all taken by whoever
            reads `events`.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: list[Job],
        counts: list[Counts],
        *,
        shape: Shape,
        settings: ServeSettings,
        metrics: Metrics,
        request_id: str,
        sources: Locate | None = None,
        calls: Calls | None = None,
        line: Line | None = None,
    ) -> None:
        self._engine, self._jobs, self._counts, self._shape = engine, jobs, counts, shape
        self._settings, self._metrics, self._request_id = settings, metrics, request_id
        self._sources, self._calls = sources, calls
        self._changed = jobs[0].changed
        self._choices = [choice for job in jobs for choice in job.choices]
        self._line, self._timer, self._rests = line, _Timer(settings, progress=False), False
        self._holders = [] if calls is None else [calls.holder() for _ in self._choices]
        limit = settings.request_timeout
        self._deadline = None if not limit else time.monotonic() + limit
        if line is not None and calls is None:
            first = 0
            for job in jobs:
                job.pass_on = partial(self._pass_on, first)
                first += len(job.choices)

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(
            prompt=sum(count.prompt for count in self._counts),
            answer=sum(choice.tokens for choice in self._choices),
            reasoning=sum(
                choice.result.reasoning_tokens for choice in self._choices if choice.result
            ),
            cached=sum(count.cached + count.said for count in self._counts),
            written=sum(count.context for count in self._counts if count.kept and not count.cached),
        )

    def close(self) -> None:
        """Stop what has not ended, for a client that has left or an answer that has failed."""
        left = [job for job in self._jobs if not job.done]
        if left:
            phase = "decode" if any(job.started for job in left) else "encode"
            self._metrics.aborted.labels(phase).inc()
        for job in self._jobs:
            if not job.done or job.error is not None:
                self._engine.cancel(job)

    def stop(self, error: Exception) -> None:
        """End what has not ended with an error."""
        for job in self._jobs:
            if not job.done:
                self._engine.cancel(job)
                job.apply(failed(job, error))

    async def whole(self) -> dict[str, Any]:
        """Return all answers once they are there.

        Raises:
            Exception: why there is none.
        """
        while not self._ended():
            await self._wait(_LOOK_S)
        self._note()
        results = [_result(choice) for choice in self._choices]
        said = [self._said(index, result.text) for index, result in enumerate(results)]
        ends = [await self._end(index, result) for index, result in enumerate(results)]
        answers = [
            Answer.of(result, text + end, calls)
            for result, text, (end, calls) in zip(results, said, ends, strict=True)
        ]
        more = await self._more(results[0])
        return self._shape.whole(answers, self.usage, more)

    async def events(self, *, progress: bool) -> AsyncIterator[bytes]:
        """Yield answers as events, and signs of life while there are none.

        Args:
            progress: True for events with how far the context is.
        """
        shape, timer = self._shape, _Timer(self._settings, progress=progress)
        self._timer = timer
        ended: set[int] = set()
        pieces = b""
        try:
            # The engine has just been asked, and begins sooner if nobody needs Python meanwhile.
            await self._wait(OPENING_S)
            pieces = shape.opening(len(self._choices), self.usage)
            while not self._ended():
                if pieces := pieces + await self._pieces(ended):
                    timer.chunk_sent()
                    yield pieces
                    pieces = b""
                if not await self._rest(timer.wait_s):
                    if timer.wants_chunk:
                        timer.chunk_sent()
                        yield shape.beat(self._progress() if progress else None)
                    elif timer.wants_comment:
                        timer.comment_sent()
                        yield comment(self._keepalive())
            pieces += await self._pieces(ended)
            self._note()
            yield pieces + shape.closing(self.usage)
        except Exception as error:
            problem = of_error(error, request_id=self._request_id)
            self._metrics.errors.labels(problem.code or str(problem.status)).inc()
            yield pieces + shape.failure(problem, self._request_id)

    def _pass_on(self, first: int, number: int) -> bool:
        """Send what came of an answer, if all before it is sent; False if `events` is to do it.

        To wake a task for every token of every stream takes three times as long.

        Args:
            first: the index of the first answer of its job.
            number: its number in the job.
        """
        line = self._line
        if line is None or not self._rests or self._changed.is_set() or not line.is_open:
            return False
        delta = self._choices[first + number].take()
        if delta.text or delta.reasoning:
            line.write(self._shape.piece(first + number, delta))
            self._timer.chunk_sent()
        return True

    async def _pieces(self, ended: set[int]) -> bytes:
        """Return what came of all answers since the last call."""
        pieces = b""
        for index, choice in enumerate(self._choices):
            delta = choice.take()
            if self._holders:
                delta = replace(delta, text=self._said(index, delta.text))
            if delta.text or delta.reasoning:
                pieces += self._shape.piece(index, delta)
            result = choice.result
            if result is not None and index not in ended:
                ended.add(index)
                end, calls = await self._end(index, result)
                if end:
                    pieces += self._shape.piece(index, Delta(text=end))
                more = await self._more(result)
                pieces += self._shape.ending(index, Answer.of(result, None, calls), more)
        return pieces

    def _said(self, index: int, text: str) -> str:
        """Return what an answer goes on with, without what is or may be a call."""
        return self._holders[index].push(text) if self._holders else text

    async def _end(self, index: int, result: Generation) -> tuple[str, tuple[Call, ...]]:
        """Return the rest of an answer's text, or its calls."""
        if self._calls is None:
            return "", ()
        calls = await self._calls.read(result)
        return ("" if calls else self._holders[index].flush()), calls

    async def _more(self, result: Generation) -> dict[str, Any]:
        """Return the fields that come with the end of an answer."""
        if self._sources is None:
            return {}
        return {"star": await self._sources(result)}

    def _ended(self) -> bool:
        """True once all answers are there.

        Raises:
            Exception: why there is none.
        """
        for job in self._jobs:
            if job.error is not None:
                raise job.error
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise timed_out(self._settings.request_timeout or 0.0)
        return all(job.done for job in self._jobs)

    async def _wait(self, timeout_s: float) -> bool:
        """Wait until something happens; False if nothing did for that time."""
        if self._deadline is not None:
            timeout_s = min(timeout_s, max(self._deadline - time.monotonic(), 0.0) + 0.001)
        try:
            # Not `wait_for`, which makes a task: this runs for every token of every stream.
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            if not self._engine.alive:
                raise EngineEndedError("the engine has ended; ask again later") from None
            return False
        self._changed.clear()
        return True

    async def _rest(self, timeout_s: float) -> bool:
        """Wait as `_wait` does, while tokens go the short way."""
        self._rests = True
        try:
            return await self._wait(timeout_s)
        finally:
            self._rests = False

    def _note(self) -> None:
        for job, count in zip(self._jobs, self._counts, strict=True):
            kept = count.context if count.kept else 0
            cached = count.cached + count.said
            self._metrics.finished(job, count.prompt, kept + count.said, cached)

    def _progress(self) -> dict[str, Any]:
        waiting = [job.lease.view() for job in self._jobs if job.lease and not job.started]
        return {
            "phase": "encode" if waiting else "decode",
            "done": sum(view.done for view in waiting),
            "total": sum(view.total for view in waiting),
        }

    def _keepalive(self) -> str:
        progress = self._progress()
        return f"keepalive {progress['phase']} {progress['done']}/{progress['total']}"


class _Timer:
    """When a stream without text is due a sign of life, by the clock."""

    def __init__(self, settings: ServeSettings, *, progress: bool) -> None:
        self._comments_s = settings.keepalive
        self._chunks_s = PROGRESS_S if progress else settings.heartbeat
        self._clock: Callable[[], float] = time.monotonic
        self._last_chunk = self._last_byte = self._clock()

    @property
    def wait_s(self) -> float:
        """Seconds until the next sign of life."""
        due = min(self._last_byte + self._comments_s, self._last_chunk + self._chunks_s)
        return min(max(due - self._clock(), 0.001), _LOOK_S)

    @property
    def wants_chunk(self) -> bool:
        return self._clock() >= self._last_chunk + self._chunks_s

    @property
    def wants_comment(self) -> bool:
        return self._clock() >= self._last_byte + self._comments_s

    def chunk_sent(self) -> None:
        self._last_chunk = self._last_byte = self._clock()

    def comment_sent(self) -> None:
        self._last_byte = self._clock()


def _result(choice: Choice) -> Generation:
    assert choice.result is not None, "all answers have ended"
    return choice.result
