"""The thread that owns the model: it reads contexts and generates answers, step by step."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch

from star_attention.engine import StarLLM
from star_attention.errors import OutOfMemoryError, StarAttentionError
from star_attention.generation.batching.batch import Batch, Row
from star_attention.generation.result import Delta
from star_attention.serve import jobs
from star_attention.serve.jobs import EngineEndedError, Event, Job
from star_attention.serve.logs import log_failure
from star_attention.storage.context import EncodedContext

_MOST_FAILURES = 3
"""Steps that may fail one after another before the engine gives up."""
_MOST_SHORT = 64
"""Short contexts that are remembered."""
_IDLE_S = 0.5
"""Seconds that an idle engine waits before it looks again, and says that it lives."""


class Store(Protocol):
    """Where contexts come from; its work is done between the steps of answers."""

    def step(self) -> bool:
        """Do a little; True if there is more to do at once."""

    def make_room(self) -> bool:
        """Free memory that nobody uses; False if there was none."""

    def close(self) -> None:
        """Save what is to be kept."""


class Engine:
    """Runs a batch of `StarLLM` in a thread of its own, for clients in event loops.

    Args:
        star: the engine that has the model.
        store: the contexts.
        max_rows: most answers that are generated at once.
        on_step: called after each step, in the thread, with the seconds that it took.
    """

    def __init__(
        self,
        star: StarLLM,
        store: Store,
        *,
        max_rows: int,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        self._star, self._store, self._on_step = star, store, on_step
        self._max_rows = max_rows
        self.batch = self._new_batch()
        """The batch; a new one after an error that is of no single answer."""
        self._failures = 0
        self._has_more = True
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._rows: dict[Row, tuple[Job, int]] = {}
        self._retried: weakref.WeakSet[Row] = weakref.WeakSet()
        self._waiting: dict[Job, None] = {}
        self._short: dict[tuple[int, ...], EncodedContext] = {}
        self._events: list[Event] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="star-engine", daemon=True)
        self.beat = time.monotonic()
        """When the thread last began a step or looked for work."""
        self.failure: BaseException | None = None
        """What ended the thread, if it has failed."""

    # ------------------------------------------------------------------------ any thread

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Have a function called in the thread, soon."""
        self._commands.put(command)

    def wake(self) -> None:
        """Have the thread look for work at once."""
        self.post(_nothing)

    def submit(self, job: Job) -> None:
        """Answer a job's questions once its context is there."""
        self.post(lambda: self._begin(job))

    def cancel(self, job: Job) -> None:
        """Stop what is done for a job, whose client has left."""
        self.post(lambda: self._cancel(job))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Return what a function returns that runs in the thread."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                setter(value)

        def run() -> None:
            try:
                value = function()
            except Exception as error:
                loop.call_soon_threadsafe(settle, future.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, future.set_result, value)

        self.post(run)
        return await future

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that wait for their context."""
        return len(self._waiting)

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the thread after its step; False if it takes longer than that."""
        self._ends.set()
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ----------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._ends.is_set():
                self._turn()
            self._end(None)
        except BaseException as error:
            self.failure = error
            log_failure("the engine", error)
            self._end(error)

    def _new_batch(self) -> Batch:
        return self._star.batch(max_rows=self._max_rows)

    def _turn(self) -> None:
        """Take commands, let the store work, and take a step of all answers."""
        self._take_commands(wait_s=0.0 if self._has_more else _IDLE_S)
        self.beat = time.monotonic()
        self._has_more = self._store.step()
        self._has_more |= self._step() or bool(self._rows)
        self._publish()

    def _take_commands(self, *, wait_s: float) -> None:
        while True:
            try:
                command = self._commands.get(block=wait_s > 0, timeout=wait_s or None)
            except queue.Empty:
                return
            command()
            wait_s = 0.0

    def _step(self) -> bool:
        """Take a step; False if there was nothing to do."""
        started = time.monotonic()
        try:
            events = self.batch.step()
        except Exception as error:
            self._start_over(error)
            return True
        self._failures = 0
        for row, delta in events:
            self._take_event(row, delta)
        if events and self._on_step is not None:
            self._on_step(time.monotonic() - started)
        return bool(events)

    def _start_over(self, error: Exception) -> None:
        """Fail all answers after an error of the whole batch, and make a new one."""
        log_failure("a step", error)
        self._failures += 1
        for job in {job for job, _ in self._rows.values()}:
            self._fail(job, error)
        if self._failures >= _MOST_FAILURES:
            raise error
        self.batch = self._new_batch()

    def _take_event(self, row: Row, delta: Delta) -> None:
        if row not in self._rows:
            return
        job, index = self._rows[row]
        if self._tries_again(row, job, index):
            return
        if delta.text or delta.reasoning:
            self._events.append(jobs.grew(job, index, delta, len(row.token_ids)))
        if not row.done:
            return
        del self._rows[row]
        if row.error is not None:
            self._fail(job, row.error)
            return
        self._events.append(jobs.ended(job, index, row.result()))
        if not any(other is job for other, _ in self._rows.values()):
            job.release()

    def _tries_again(self, row: Row, job: Job, index: int) -> bool:
        """True for an answer that had no memory to begin, and begins again with more."""
        lacks_memory = isinstance(row.error, OutOfMemoryError) and not row.token_ids
        if not lacks_memory or row in self._retried or not self._store.make_room():
            return False
        del self._rows[row]
        question = job.questions[index]
        try:
            again = self.batch.add(self._context(job), question.ids, **question.options)
        except Exception as error:
            self._fail(job, error)
            return True
        self._rows[again] = job, index
        self._retried.add(again)
        return True

    def _begin(self, job: Job) -> None:
        if self._ends.is_set():
            self._fail(job, _ended())
            return
        self._waiting[job] = None
        if job.lease is None:
            self._ask(job)
        else:
            job.lease.ready.add_done_callback(lambda _: self.post(lambda: self._ask(job)))

    def _ask(self, job: Job) -> None:
        """Add a job's questions to the batch, now that its context is there."""
        if job not in self._waiting:
            return
        del self._waiting[job]
        try:
            context = self._context(job)
            for index, question in enumerate(job.questions):
                row = self.batch.add(context, question.ids, **question.options)
                self._rows[row] = job, index
        except Exception as error:
            self._fail(job, error)
            return
        self._events.append(jobs.started(job))

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

    def _fail(self, job: Job, error: BaseException) -> None:
        self._events.append(jobs.failed(job, error))
        self._drop(job)

    def _cancel(self, job: Job) -> None:
        self._waiting.pop(job, None)
        self._drop(job)

    def _drop(self, job: Job) -> None:
        for row in [row for row, (other, _) in self._rows.items() if other is job]:
            del self._rows[row]
            row.cancel()
        job.release()

    def _publish(self) -> None:
        """Hand each event loop its events, in one call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Event]] = defaultdict(list)
        for event in self._events:
            by_loop[event.job.loop].append(event)
        self._events = []
        for loop, events in by_loop.items():
            # A loop that is closed has no clients.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_apply, events)

    def _end(self, error: BaseException | None) -> None:
        """Fail what is left, and save what is to be kept."""
        self._ends.set()
        for job in {*self._waiting, *(job for job, _ in self._rows.values())}:
            self._fail(job, error or _ended())
        self._waiting.clear()
        self._take_commands(wait_s=0.0)
        self._publish()
        if error is None:
            self.batch.close()
            self._store.close()


def _nothing() -> None:
    return None


def _ended() -> StarAttentionError:
    return EngineEndedError("the server is shutting down; ask again in a moment")


def _apply(events: list[Event]) -> None:
    for event in events:
        event.job.apply(event)
