"""All ranks of a program: their process groups, the calls they make together, and recovery.

Collectives run on process groups of our own, in an order that is the same on all ranks. While a
rank waits for a collective it checks for faults of others (`watchdog.py`), so it never waits for a
rank that does not come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from star_attention.config import STALL_S
from star_attention.distributed.comm import Pending
from star_attention.distributed.following import FOLLOW, Followers
from star_attention.distributed.groups import ProcessGroups
from star_attention.distributed.pauses import Pauses
from star_attention.distributed.registry import contexts_of, engines_of
from star_attention.distributed.rendezvous import START_S, STARTUP, connect, dist
from star_attention.distributed.streams import Streams
from star_attention.distributed.watchdog import (
    BETWEEN_CALLS,
    BUSY,
    GONE,
    IDLE,
    LEADING,
    WAITING,
    Watchdog,
)
from star_attention.errors import (
    InvalidInputError,
    RankError,
    first_line,
    quote,
    release_frames_on_oom,
)

POLL = timedelta(seconds=0.1)
"""How often a rank that waits for a collective checks for faults."""


class World:
    """One rank's view of all ranks; making one is collective.

    Attributes:
        stall_s: the longest silence of a rank, in seconds.
        broken: why the ranks cannot continue; every further call raises it.
        early_message: a message that was received, but belongs to the next call.
        shared_error: an exception of this call that every rank raises by itself.
        contexts, engines: what all ranks hold parts of.
        followers: the ranks that follow rank 0.
        pauses: those between two pieces of a stream.
        last_call: name of the last call that has ended; None before the first.
        in_call: True while a call runs.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        port: int,
        *,
        server: Any = None,
        name: str = "star-attention",
        stall_s: float = STALL_S,
        start_s: float = START_S,
    ) -> None:
        """Connect to the other ranks. `TorchComm` documents the arguments."""
        if not stall_s > 0:
            raise InvalidInputError(
                f"stall_s {quote(stall_s)} is not above 0; pass the stall limit in seconds"
            )
        self.rank, self.size, self.stall_s = rank, size, stall_s
        self.contexts, self.engines = contexts_of(rank), engines_of(rank)
        self.streams = Streams()
        self.broken: RankError | None = None
        self.shared_error: BaseException | None = None
        self.early_message: Any = None
        self.last_call: str | None = None
        self.in_call = False
        # The state between calls.
        self._resting = IDLE
        # What rank 0 has under way on ranks that follow.
        self._led = 0
        # Collectives that nobody has waited for yet.
        self._open_collectives = 0
        self._lock = threading.RLock()
        self.pauses = Pauses(self._lock)
        # Lives as long as this rank.
        self._server = server
        try:
            store = connect(host, port, start_s)
            self.followers = Followers(dist.PrefixStore(f"{name}/follow", store))
            self.groups = ProcessGroups(store, name, rank, start_s)
            self.groups.make("gloo", range(size), epoch=0)
        except RankError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            cause = f"not all {size} ranks connected within {start_s:g} s ({first_line(error)})"
            raise RankError(None, STARTUP, cause) from error
        timeout_s = max(1.0, stall_s / 2)
        self.watchdog = Watchdog(
            lambda: dist.PrefixStore(f"{name}/watch", connect(host, port, timeout_s)),
            rank,
            size,
            stall_s,
            on_fault=self.groups.abort,
        )

    # ------------------------------------------------------------------ groups and collectives

    def group(self, backend: str, ranks: range) -> Any:
        """Return the process group of these ranks; its first use is collective among them."""
        group = self.groups.get(backend, ranks)
        if group is None:
            with self.waiting():
                group = self.groups.make(
                    backend, ranks, epoch=self.watchdog.epoch, check=self._raise_if_broken
                )
        return group

    def everyone(self) -> Any:
        """Return the group of all ranks, which carries messages."""
        return self.group("gloo", range(self.size))

    def issue(self, group: Any, collective: Callable[[Any], Any]) -> Pending:
        """Start a collective on a group."""
        self._raise_if_broken()
        self.watchdog.issued += 1
        self._open_collectives += 1
        try:
            work = collective(group)
        except dist.DistError as error:
            # NCCL notices the death of a rank on another machine by itself.
            raise self._explained(error) from error

        def wait() -> None:
            self._wait(work, group)
            self._open_collectives -= 1

        return Pending(wait)

    def launch(self, collective: Callable[[], Any]) -> Any:
        """Return the result of a collective for which the device's stream waits by itself."""
        self._raise_if_broken()
        self.watchdog.issued += 1
        return collective()

    def all_gather(self, part: Tensor, group: Any) -> list[Tensor]:
        """Return the parts of all members of a group, which have one shape, in their order."""
        parts = [torch.empty_like(part) for _ in range(group.size())]
        self.issue(group, lambda group: group.allgather(parts, part)).wait()
        return parts

    def _wait(self, work: Any, group: Any) -> None:
        if type(group).__name__ == "ProcessGroupNCCL":
            # The stream waits. If a rank is lost, the watchdog aborts the collective.
            try:
                work.wait()
            except dist.DistError as error:
                raise self._explained(error) from error
            return
        with self.waiting():
            while True:
                # Asked first: it may complete between the timeout and a question after it.
                completed = work.is_completed()
                try:
                    work.wait(POLL)
                    return
                except RuntimeError as error:
                    self._raise_if_faulty()
                    if completed:
                        raise self._explained(error) from error

    def _explained(self, error: Exception) -> BaseException:
        """Return the fault of another rank that broke a connection."""
        return self.watchdog.find_cause(first_line(error)).as_error()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark this rank as waiting, so that the others do not take it for hung."""
        self.watchdog.set_state(WAITING)
        try:
            yield
        finally:
            self.watchdog.set_state(BUSY if self.in_call else self._resting)

    # ------------------------------------------------------------------ calls and faults

    @contextmanager
    def call(self, where: str) -> Iterator[bool]:
        """Run a call that all ranks make; yields True unless it is inside another one.

        An exception in it is reported to the other ranks, and theirs is raised here.
        """
        with self._lock:
            if self.broken is not None:
                raise self.broken
            if self.in_call:
                yield False
                return
            self.pauses.cancel()
            try:
                self.in_call = True
                self.watchdog.issued = 0
                self.watchdog.set_state(BUSY)
                self.watchdog.tick(where)
                with release_frames_on_oom():
                    yield True
            except BaseException as error:
                self._handle_failure(error)
                raise
            finally:
                self.in_call, self.last_call = False, where
                # Its traceback holds what the call was about.
                self.shared_error = None
                self.watchdog.set_state(self._resting)
                self.watchdog.tick(BETWEEN_CALLS)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Mark this rank as one that only waits for calls, and hangs if it does anything else."""
        with self.followers.joined():
            self._resting = BUSY
            self.watchdog.set_state(BUSY)
            try:
                yield
            finally:
                self._resting = IDLE
                self.watchdog.set_state(IDLE)

    def watch_others(self, change: int | None) -> None:
        """Look after the other ranks between calls, too, or leave it.

        Args:
            change: 1 for a reason to do so, -1 for one that has gone; None for all that have.
        """
        self._led = 0 if change is None else max(0, self._led + change)
        self._resting = LEADING if self._led else IDLE
        if not self.in_call:
            self.watchdog.set_state(self._resting)

    def await_call(self, receive: Callable[[], Any]) -> Any:
        """Return what `receive` gets from rank 0 between two calls, however long that takes.

        Raises:
            RankError: another rank died or was stopped.
        """
        with self._lock:
            while True:
                if self.broken is not None:
                    raise self.broken
                self.watchdog.tick(FOLLOW)
                try:
                    return receive()
                except BaseException as error:
                    # The exception of a call that this rank has already left is no reason to end.
                    self._handle_failure(error)
                    if self.broken is not None or not isinstance(error, Exception):
                        raise

    def _handle_failure(self, error: BaseException) -> None:
        """Report an exception to the other ranks and meet them again, or leave them for good."""
        if error is self.shared_error:
            # Every rank raises it by itself, at the same point of the same call.
            return
        fault = self.watchdog.fault
        interrupted = isinstance(error, KeyboardInterrupt)
        # In a notebook Ctrl-C reaches rank 0 alone; the ranks that follow it are there to go on.
        is_led = interrupted and self.rank == 0 and self.followers.count() > 0
        can_meet = (isinstance(error, Exception) or is_led) and (
            fault is None or fault.is_exception
        )
        # An exit (SystemExit, a signal) is not reported: as a rule it follows from the death of
        # another rank, and that is the cause to report.
        if interrupted or (can_meet and not isinstance(error, RankError)):
            self.watchdog.report_failure(
                type(error).__name__, "interrupted" if interrupted else str(error)
            )
        if can_meet and self._recover():
            return
        self.broken = (
            error
            if isinstance(error, RankError)
            else RankError(None, self.watchdog.where, f"a call failed ({error})")
        )
        # Anything else ends this process, which first looks for the rank that died (`diagnose`).
        if isinstance(error, Exception):
            self.watchdog.leave(first_line(self.broken))

    def _recover(self) -> bool:
        """Meet the other ranks after an exception; return False if not all of them arrive.

        Groups are made again: in the old ones some ranks may still wait for ranks that left.
        """
        self.watchdog.set_state(WAITING)
        if not self.watchdog.meet():
            return False
        self.groups.abort()
        if self._open_collectives:
            self.groups.abandon()
        self.groups.clear()
        self._open_collectives, self.early_message = 0, None
        self.streams.active = None
        try:
            self.everyone()
        except RuntimeError:
            return False
        return True

    def tick(self, where: str | None = None) -> None:
        """Report progress of this rank; raise if the watchdog has found a fault of another."""
        self.watchdog.tick(where)
        if self.in_call:
            self._raise_if_faulty()

    def _raise_if_broken(self) -> None:
        if self.broken is not None:
            raise self.broken
        if self.in_call:
            self._raise_if_faulty()

    def _raise_if_faulty(self) -> None:
        fault = self.watchdog.check()
        if fault is not None:
            raise fault.as_error()

    def others(self) -> int:
        """Return how many other ranks have not left for good."""
        statuses = enumerate(self.watchdog.statuses)
        return sum(status.get("state") != GONE for rank, status in statuses if rank != self.rank)

    def close(self) -> None:
        """Leave the other ranks and let them know."""
        self.pauses.close()
        self.watchdog.close()
        if self.broken is not None or self._open_collectives:
            self.groups.abandon()
