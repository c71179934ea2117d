"""Rank 0's side of a batch on several ranks: a message before each of the steps that all take.

Rank 0 owns the rows: it admits them, draws their tokens and ends them. The other ranks only run the
forwards (`following.BatchFollower`). On one process nothing is sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from star_attention.distributed.comm import Comm
from star_attention.distributed.messages import BATCH
from star_attention.distributed.registry import News
from star_attention.errors import RankError
from star_attention.hf.execution.request import Program
from star_attention.hf.execution.sources import Readings
from star_attention.inputs import ContextInput
from star_attention.runtime import Runtime

numbers = itertools.count(1)
"""Numbers of rows, cohorts and contexts under way: their ages, and their names to other ranks."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """Read queries on a context, and give rows their keys and values.

    Attributes:
        context: the context's key.
        program: the queries, and how they are read.
        rows: the number of each row, and which query it answers.
        kept: key of the keys and values that earlier turns kept; None for none.
    """

    context: int
    program: Program
    rows: list[tuple[int, int]]
    kept: int | None


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Run a forward of a cohort's newest tokens.

    Attributes:
        cohort: the cohort's number.
        rows: the numbers of its rows, with the tokens of each after the context; None for those of
            its last forward.
        tokens: their newest tokens.
        rope_length: that of the rows.
    """

    cohort: int
    rows: dict[int, int] | None
    tokens: list[int]
    rope_length: int | None


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Keep the keys and values of a row's first tokens, under a key, for a next turn."""

    row: int
    tokens: int
    key: int


@dataclass(frozen=True, kw_only=True)
class ReadAgain:
    """Read the answer of a row once more, for its sources."""

    row: int
    readings: Readings


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Encode a part of a context.

    Attributes:
        number: the context's number.
        contexts: what it is made of, with its first part; None later.
        reuse: key of the context whose blocks are copied; None for none.
    """

    number: int
    contexts: list[ContextInput] | None = None
    reuse: int | None = None


@dataclass(frozen=True)
class Report:
    """Say which command was the last that this rank has run."""


@dataclass(frozen=True)
class Suspend:
    """Leave the batch for another call."""


@dataclass(frozen=True)
class End:
    """Leave the batch for good."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What rank 0 sends.

    Attributes:
        dropped: numbers of rows and contexts that have ended.
        news: what rank 0 still has of contexts and kept keys; None if that is what it had before.
        what: one of the commands above; None for nothing more.
        number: counts the commands that are part of a step; 0 for others.
    """

    dropped: list[int]
    news: News | None
    what: Any
    number: int


class Lead:
    """Tells the other ranks what a batch does.

    It is a stream (`distributed.streams`): other calls of rank 0 suspend it, and the next step
    resumes it.

    Args:
        comm: the ranks.

    Attributes:
        number: the batch's number on all ranks.
        ended: True once no step follows.
        failure: the last exception of a single rank, which has interrupted the others.
        faults: how many there were.
        was_late: True if the last one was of a context, in a command before the one that it
            interrupted: that one is to be repeated.
        has_failed: True if the batch cannot go on, because ranks are lost or have different rows.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.number = 0
        self.is_suspended, self.ended, self.has_failed = True, False, False
        self.failure: Exception | None = None
        self.faults, self.was_late = 0, False
        # The last command that has been run, and the last one that has changed rows.
        self._done = self._rows_done = 0
        self._dropped: list[int] = []
        # What was sent last.
        self._sent: list[int] = []
        self._news: News | None = None

    @classmethod
    def begin(cls, runtime: Runtime) -> Lead:
        """Return what leads a new batch. Collective; the others run `following.begin`."""
        lead, comm = cls(runtime.comm), runtime.comm
        if comm.size > 1:
            lead.number = comm.streams.new_number()
            comm.broadcast_object((BATCH, lead.number))
            comm.streams.add(lead)
            comm.watch_others(+1)
        return lead

    @property
    def is_alone(self) -> bool:
        """True on a single process."""
        return self._comm.size == 1

    @contextmanager
    def command(self, what: Callable[[], Any]) -> Iterator[None]:
        """Run a part of a step that all ranks run. `what` makes the command for the others.

        After an exception on one rank, all ranks have it. If they have all done what came before,
        they go on as if nothing of this part had happened. They may lack a part of a context, whose
        encoding ends then: rank 0 does not wait for the others there.
        """
        if self.is_alone:
            yield
            return
        self.was_late = False
        try:
            with self._comm.streaming(self):
                command = what()
                self._send(command, self._done + 1)
                yield
            self._done += 1
            if not isinstance(command, Encode):
                self._rows_done = self._done
        except BaseException as error:
            if error is not self._comm.shared_error:
                self._recover(error)
            raise

    def _recover(self, error: BaseException) -> None:
        """Find out if the batch can go on after an exception."""
        self.has_failed, self.is_suspended = True, True
        if not isinstance(error, Exception):
            return
        self.failure, self.faults = error, self.faults + 1
        # Nobody knows what has arrived.
        self._dropped, self._news = self._sent + self._dropped, None
        with suppress(Exception), self._comm.streaming(self):
            self._send(Report())
            done = min(self._comm.gather(self._done))
            self.has_failed, self.was_late = done < self._rows_done, done < self._done

    def drop(self, number: int) -> None:
        """Note that a row or a context has ended; the next command says so."""
        if not self.is_alone:
            self._dropped.append(number)

    def settle(self) -> None:
        """Let the other ranks free what has ended, when no step may follow for long.

        Raises:
            RankError: a rank is lost.
        """
        if self._dropped and not self.has_failed:
            with self.command(lambda: None):
                pass

    def close(self) -> None:
        """End the batch."""
        if self.ended or self.is_alone:
            return
        if self._comm.streams.active is self and not self.has_failed:
            # Ranks that are lost are no news to who leaves them.
            with suppress(RankError), self._comm.streaming(self):
                self._send(End())
        self.ended = True
        self._comm.watch_others(-1)

    def check(self) -> None:
        """Raise an error if the batch cannot go on; rank 0 may be idle.

        Raises:
            RankError: a rank died or hangs.
            Exception: that of a rank that lacks something now.
        """
        if self.is_alone:
            return
        try:
            self._comm.check()
        except Exception as error:
            self._recover(error)
            if self.has_failed:
                raise

    def _send(self, what: Any, number: int = 0) -> None:
        # Another thread may drop more meanwhile.
        self._sent = dropped = self._dropped[:]
        del self._dropped[: len(dropped)]
        news = self._comm.contexts.news()
        changed = None if news == self._news else news
        self._news = news
        command = Command(dropped=dropped, news=changed, what=what, number=number)
        self._comm.broadcast_object((BATCH, self.number, command))

    # The stream, as other calls see it.

    def suspend(self) -> bool:
        """Let the other ranks leave the batch for another call, before which they hear the news."""
        self._send(Suspend())
        self.is_suspended, self._news = True, None
        return True

    def repeat(self) -> None:
        raise AssertionError("rank 0 repeats nothing")

    def leave(self) -> None:
        raise AssertionError("rank 0 leaves by itself")

    def end(self, answers: Any) -> None:
        raise AssertionError("rank 0 ends by itself")
