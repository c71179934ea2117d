"""An answer under way, between the event loop that its client waits in and the engine's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from star_attention.errors import StarAttentionError
from star_attention.generation.conversation import KeptTokens
from star_attention.generation.result import Delta, Generation
from star_attention.serve.contexts.lease import Lease
from star_attention.serve.refusals import RefusalError


class EngineEndedError(StarAttentionError):
    """The engine ends, or has ended: nobody will answer."""


def _pass_nothing_on(number: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a context once it is there.

    Attributes:
        ids: token ids that follow the context.
        options: keywords of `StarLLM.generate`.
    """

    ids: list[int]
    options: dict[str, Any]


@dataclass(eq=False)
class Choice:
    """One of the answers of a job.

    Attributes:
        text, reasoning: what came and has not been taken.
        result: the answer, once it has ended.
        tokens: tokens so far.
    """

    text: str = ""
    reasoning: str = ""
    result: Generation | None = None
    tokens: int = 0

    def take(self) -> Delta:
        """Return what came since the last call: a client that reads slowly gets larger pieces."""
        delta = Delta(text=self.text, reasoning=self.reasoning)
        self.text = self.reasoning = ""
        return delta


@dataclass(eq=False)
class Job:
    """Questions on one context, for one client. Its fields belong to the event loop.

    Attributes:
        lease: holds the context in the store; None if it is `first_ids`.
        questions: one for each answer.
        loop: the event loop of its client.
        choices: the answers, in the order of the questions.
        error: why there is no answer; None if there is none.
        tenant: whose they are.
        first_ids: a context of a token or so, for a prompt that is a query as a whole.
        again: opens the context once more, if somebody deletes it before it is there; None for one
            that the client has named.
        begun: what an earlier answer has kept of the questions; dropped once an answer has begun.
        keep: takes what the answer keeps, in the engine's thread; None to keep nothing.
        changed: set when something happens; jobs of one client share it.
        pass_on: takes the number of an answer that goes on, and sends what came of it at once;
            False if it cannot, and somebody is to be woken for it.
        created, started, first, ended: times of `time.monotonic`, 0.0 before.
    """

    lease: Lease | None
    questions: list[Question]
    loop: asyncio.AbstractEventLoop
    tenant: str = ""
    first_ids: tuple[int, ...] = ()
    again: Callable[[], Lease] | None = None
    begun: KeptTokens | None = None
    keep: Callable[[KeptTokens], None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    pass_on: Callable[[int], bool] = _pass_nothing_on
    choices: list[Choice] = field(default_factory=list)
    error: BaseException | None = None
    created: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.choices = [Choice() for _ in self.questions]

    @property
    def lacks_context(self) -> bool:
        """True if somebody has deleted the context before it was there."""
        error = None if self.lease is None else self.lease.ready.exception()
        return isinstance(error, RefusalError) and error.code == "context_deleted"

    def release(self) -> None:
        """Let the context go."""
        if self.lease is not None:
            self.lease.release()

    @property
    def done(self) -> bool:
        """True once nothing follows."""
        return self.error is not None or all(each.result is not None for each in self.choices)

    def apply(self, event: Event) -> None:
        """Take in what happened; in the event loop."""
        event.change(self)
        if event.grown is not None and self.pass_on(event.grown):
            return
        if self.done:
            self.ended = self.ended or time.monotonic()
        self.changed.set()


@dataclass(frozen=True)
class Event:
    """Something that the engine tells the event loop about a job.

    Attributes:
        job: the job.
        change: notes it there.
        grown: the number of the answer that goes on; None for all else.
    """

    job: Job
    change: Callable[[Job], None]
    grown: int | None = None


def started(job: Job) -> Event:
    """Say that the context is there, and that the questions are being read."""

    def change(job: Job) -> None:
        job.started = time.monotonic()

    return Event(job, change)


def grew(job: Job, index: int, delta: Delta, tokens: int) -> Event:
    """Say that an answer goes on."""

    def change(job: Job) -> None:
        choice = job.choices[index]
        choice.text += delta.text
        choice.reasoning += delta.reasoning
        choice.tokens = tokens
        job.first = job.first or time.monotonic()

    return Event(job, change, index)


def ended(job: Job, index: int, result: Generation) -> Event:
    """Say that an answer has ended."""

    def change(job: Job) -> None:
        job.choices[index].result = result
        job.choices[index].tokens = len(result.token_ids)
        job.first = job.first or time.monotonic()

    return Event(job, change)


def failed(job: Job, error: BaseException) -> Event:
    """Say that there will be no answer."""

    def change(job: Job) -> None:
        job.error = job.error or error

    return Event(job, change)
