"""The thread that owns the model: it reads contexts and generates answers, step by step."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from star_attention.errors import StarAttentionError
from star_attention.generation.batching.batch import Batch
from star_attention.serve.answers import Answers, Store
from star_attention.serve.jobs import EngineEndedError, Event, Job
from star_attention.serve.logs import log_failure

_log = logging.getLogger(__name__)

_IDLE_S = 0.5
"""Seconds that an idle engine waits before it looks again, and says that it lives."""
_LEAST_COMMANDS_S = 0.002
"""Seconds that commands get between two steps, however short these are."""


def _nothing_cold() -> Iterator[str]:
    return iter(())


class Engine:
    """Runs answers and a store of contexts in a thread of its own, for clients in event loops.

    Args:
        answers: the answers under way.
        store: the contexts, whose work is done between the steps of answers.
        warm_up: does what the first answers would wait for, a piece at a time, and names the next.

    Attributes:
        is_warm: True once that is done.
        on_warm: called in the thread after the warm-up.
        on_step: called in the thread after each step of answers, with the seconds that it took.
        beat: when the thread last began a step or looked for work.
        failure: what ended the thread, if it has failed.
    """

    def __init__(
        self, answers: Answers, store: Store, warm_up: Callable[[], Iterator[str]] = _nothing_cold
    ) -> None:
        self._answers, self._store, self._warm_up = answers, store, warm_up
        self.is_warm = False
        self.on_warm: Callable[[], object] = lambda: None
        self.on_step: Callable[[float], object] = lambda seconds: None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ends = threading.Event()
        self._has_more = True
        self._thread = threading.Thread(target=self._run, name="star-engine", daemon=True)
        self.beat = time.monotonic()
        self.failure: BaseException | None = None

    # ------------------------------------------------------------------------ any thread

    @property
    def batch(self) -> Batch:
        """The rows of all answers."""
        return self._answers.batch

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that wait for their context, or for a place among the answers."""
        return len(self._answers.waiting) + len(self._answers.queue)

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
        self.post(lambda: self._answers.cancel(job))

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
            self._warm()
            while not self._ends.is_set():
                self._turn()
            self._end(None)
        except BaseException as error:
            self.failure = error
            log_failure("the engine", error)
            self._end(error)

    def _warm(self) -> None:
        """Do what the first answers would wait for; a server that cannot is slower at first."""
        started = time.monotonic()
        try:
            for piece in self._warm_up():
                self.beat = time.monotonic()
                if self._ends.is_set():
                    return
                _log.info("warming up: %s", piece)
        except Exception as error:
            log_failure("warming up", error)
        self.on_warm()
        _log.info("warm after %.1f s", time.monotonic() - started)
        self.is_warm = True

    def _turn(self) -> None:
        """Take commands, let the store work, and take a step of all answers.

        While there are answers, commands get as long as the last step took: many of them at once
        would be a gap in all streams.
        """
        most_s = max(self._answers.step_s, _LEAST_COMMANDS_S) if self._answers.running else math.inf
        self._take_commands(wait_s=0.0 if self._has_more else _IDLE_S, most_s=most_s)
        self.beat = time.monotonic()
        self._has_more = self._store.step()
        if self._answers.step():
            self._has_more = True
            self.on_step(self._answers.step_s)
        self._has_more |= self._answers.running
        self._publish()

    def _take_commands(self, *, wait_s: float, most_s: float = math.inf) -> None:
        """Take at least one command, if there is any, and others for so long."""
        ends = time.monotonic() + most_s
        while True:
            try:
                command = self._commands.get(block=wait_s > 0, timeout=wait_s or None)
            except queue.Empty:
                return
            command()
            wait_s = 0.0
            if time.monotonic() >= ends:
                return

    def _begin(self, job: Job) -> None:
        if self._ends.is_set():
            self._answers.fail(job, _ended())
        elif job.lease is None:
            self._answers.ask(job)
        else:
            self._answers.waiting[job] = None
            job.lease.ready.add_done_callback(lambda _: self.post(lambda: self._go_on(job)))

    def _go_on(self, job: Job) -> None:
        """Ask a job's questions, whose context is there or will never be."""
        # A job that was canceled waits no more.
        if job not in self._answers.waiting:
            return
        if job.again is None or not job.lacks_context:
            self._answers.ask(job)
            return
        job.release()
        try:
            job.lease = job.again()
        except Exception as error:
            self._answers.fail(job, error)
            return
        self._begin(job)

    def _publish(self) -> None:
        """Hand each event loop its events, in one call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Event]] = defaultdict(list)
        for event in self._answers.take_events():
            by_loop[event.job.loop].append(event)
        for loop, events in by_loop.items():
            # A loop that is closed has no clients.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_apply, events)

    def _end(self, error: BaseException | None) -> None:
        """Fail what is left, and save what is to be kept."""
        self._ends.set()
        self._answers.fail_all(error or _ended())
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
