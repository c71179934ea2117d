"""The answers that an engine's thread has under way: rows of a batch, for jobs of clients."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from dataclasses import replace
from typing import Protocol

import torch

from star_attention.engine import StarLLM
from star_attention.errors import OutOfMemoryError
from star_attention.generation.batching.batch import Batch, Row
from star_attention.generation.conversation import KeptTokens, kept_by
from star_attention.generation.result import Delta, Generation
from star_attention.serve import jobs
from star_attention.serve.jobs import Event, Job, Question
from star_attention.serve.logs import log_failure
from star_attention.serve.turns import Turns
from star_attention.storage.context import EncodedContext

_MOST_FAILURES = 3
"""Steps that may fail one after another before the engine gives up."""
_MOST_SHORT = 64
"""Short contexts that are remembered."""


class Store(Protocol):
    """Where contexts come from. All of it is for the engine's thread."""

    def step(self) -> bool:
        """Do a little; True if there is more to do at once."""

    def make_room(self) -> bool:
        """Free memory that nobody uses; False if there was none."""

    def close(self) -> None:
        """Save what is to be kept."""


class Answers:
    """Answers under way. All of it is for the engine's thread, but for the numbers.

    Args:
        star: the engine that has the model.
        store: where memory comes from.
        max_rows: most answers that are generated at once.
        max_rows_per_key: most of them of one tenant; None for no limit.

    Attributes:
        batch: their rows; a new one after an error that is of no single answer.
        waiting: jobs that wait for their context.
        queue: jobs that wait for a place in the batch.
        events: what happened since they were taken.
    """

    def __init__(
        self, star: StarLLM, store: Store, max_rows: int, max_rows_per_key: int | None = None
    ) -> None:
        self._star, self._store, self._max_rows = star, store, max_rows
        self._most, self._turns = max_rows_per_key or max_rows, Turns()
        self._rows: dict[Row, tuple[Job, int]] = {}
        self._retried: weakref.WeakSet[Row] = weakref.WeakSet()
        self._short: dict[tuple[int, ...], EncodedContext] = {}
        self._failures = 0
        self.waiting: dict[Job, None] = {}
        self.queue: dict[Job, None] = {}
        self.events: list[Event] = []
        self.batch = self._new_batch()
        self.step_s = 0.0
        """Seconds of the last step."""

    @property
    def running(self) -> bool:
        """True while answers are generated."""
        return bool(self._rows or self.queue)

    def ask(self, job: Job) -> None:
        """Let a job's questions wait for a place in the batch, now that its context is there."""
        self.waiting.pop(job, None)
        self.queue[job] = None
        self._admit()

    def step(self) -> bool:
        """Take a step; False if there was nothing to do.

        Raises:
            Exception: several steps have failed one after another.
        """
        started = time.monotonic()
        try:
            events = self.batch.step()
        except Exception as error:
            self._start_over(error)
            return True
        self._failures = 0
        for row, delta in events:
            if row in self._rows:
                self._take(row, delta)
        self._admit()
        self.step_s = time.monotonic() - started
        return bool(events)

    def cancel(self, job: Job) -> None:
        """Stop what is done for a job."""
        self.waiting.pop(job, None)
        self.queue.pop(job, None)
        for row in [row for row, (other, _) in self._rows.items() if other is job]:
            del self._rows[row]
            row.cancel()
            if job.keep is not None and row.done and row.error is None:
                # Its client may go on with what it has seen.
                self._kept(job, row)
        job.release()

    def fail(self, job: Job, error: BaseException) -> None:
        """End a job without its answers."""
        self.events.append(jobs.failed(job, error))
        self.cancel(job)

    def fail_all(self, error: BaseException) -> None:
        """End all jobs."""
        for job in {*self.waiting, *self.queue, *(job for job, _ in self._rows.values())}:
            self.fail(job, error)

    def take_events(self) -> list[Event]:
        """Return what happened since the last call."""
        events, self.events = self.events, []
        return events

    # ----------------------------------------------------------------------------------- inside

    def _admit(self) -> None:
        """Add jobs to the batch while it has room: tenants take turns, and each job its own."""
        while self.queue and self.batch.running + self.batch.waiting < self._max_rows:
            rows = Counter(job.tenant for job, _ in self._rows.values())
            fits = [
                job
                for job in self.queue
                if not rows[job.tenant] or rows[job.tenant] + len(job.questions) <= self._most
            ]
            if not fits:
                return
            tenant = self._turns.first((job.tenant for job in fits), rows)
            self._turns.note(tenant)
            self._begin(next(job for job in fits if job.tenant == tenant))

    def _begin(self, job: Job) -> None:
        """Add a job's questions to the batch."""
        del self.queue[job]
        try:
            context = self._context(job)
            for index, question in enumerate(job.questions):
                row = self._add(job, context, question, job.begun)
                self._rows[row] = job, index
        except Exception as error:
            self.fail(job, error)
            return
        self.events.append(jobs.started(job))

    def _new_batch(self) -> Batch:
        return self._star.batch(max_rows=self._max_rows)

    def _start_over(self, error: Exception) -> None:
        """Fail all answers after an error of the whole batch, and make a new one."""
        log_failure("a step", error)
        self._failures += 1
        for job in {job for job, _ in self._rows.values()}:
            self.fail(job, error)
        if self._failures >= _MOST_FAILURES:
            raise error
        self.batch = self._new_batch()

    def _take(self, row: Row, delta: Delta) -> None:
        """Note what a step did for a row."""
        job, index = self._rows[row]
        if self._begins_again(row, job, index):
            return
        # It has a copy of its own now.
        job.begun = None
        if delta.text or delta.reasoning:
            self.events.append(jobs.grew(job, index, delta, row.num_tokens))
        if not row.done:
            return
        del self._rows[row]
        if row.error is not None:
            self.fail(job, row.error)
            return
        self.events.append(jobs.ended(job, index, self._kept(job, row)))
        if not any(other is job for other, _ in self._rows.values()):
            job.release()

    def _add(
        self, job: Job, context: EncodedContext, question: Question, begun: KeptTokens | None
    ) -> Row:
        keep = job.keep is not None
        # A tensor is token ids; of a list each item would be looked at to know that.
        ids = torch.tensor(question.ids, device="cpu")
        return self.batch.add(context, ids, begun=begun, keep=keep, **question.options)

    def _kept(self, job: Job, row: Row) -> Generation:
        """Return a row's answer after keeping what prompts that go on with it need."""
        result = row.result()
        kept = kept_by(result.conversation)
        if kept is not None and job.keep is not None:
            job.keep(kept)
        # It refers to the context, which is the store's.
        return replace(result, conversation=None)

    def _begins_again(self, row: Row, job: Job, index: int) -> bool:
        """True for an answer that had no memory to begin, and begins again with more."""
        lacks_memory = isinstance(row.error, OutOfMemoryError) and not row.token_ids
        if not lacks_memory or row in self._retried or not self._store.make_room():
            return False
        del self._rows[row]
        question = job.questions[index]
        try:
            again = self._add(job, self._context(job), question, job.begun)
        except Exception as error:
            self.fail(job, error)
            return True
        self._rows[again] = job, index
        self._retried.add(again)
        return True

    def _context(self, job: Job) -> EncodedContext:
        """Return a job's context: that of the store, or a short one that all may use."""
        if job.lease is not None:
            context: EncodedContext = job.lease.ready.result()
            return context
        ids = job.first_ids
        if ids not in self._short:
            if len(self._short) >= _MOST_SHORT:
                self._short.pop(next(iter(self._short)))
            self._short[ids] = self._star.encode(torch.tensor(ids), progress=False)
        return self._short[ids]
