"""Detects ranks that died, hang or failed, through a store next to the collectives.

`find_cause` explains a closed connection, `_find_fault` detects silence.

Each rank has a thread that writes the rank's status to the store several times within the stall
limit, and reads the statuses of the others. The limit is on silence, not on time: a rank that
reports a layer now and then may take as long as it needs. So may one that compiles: there CPU time
is progress (`Watchdog.working`).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from star_attention.distributed.cpu_time import Work
from star_attention.distributed.faults import Fault
from star_attention.distributed.following import FOLLOW
from star_attention.distributed.rendezvous import STARTUP

IDLE, LEADING, BUSY, WAITING, GONE = "idle", "leading", "busy", "waiting", "gone"
"""States of a rank. Between two calls it is idle, and nobody's end concerns it; rank 0 may be
leading instead, and looks after the ranks that follow."""

BETWEEN_CALLS = "between calls"
"""Place of a rank that is in no call."""


class _LastSeen:
    """Times of a rank's last sign of life and of its last progress."""

    def __init__(self) -> None:
        self.beat_at = self.progress_at = time.monotonic()
        self._beat = self._progress = ""

    def update(self, status: dict[str, Any], now: float) -> None:
        beat = str(status.get("beat"))
        progress = f"{status.get('ticks')} {status.get('state')}"
        if beat != self._beat:
            self._beat, self.beat_at = beat, now
        if progress != self._progress:
            self._progress, self.progress_at = progress, now


class Watchdog:
    """The watchdog thread of one rank; the main thread reports to it and queries it.

    Attributes:
        issued: collectives that this rank has started in the current call.
        share: tokens of this rank's share of phase 1: done, and in total.
        waits_on_device: True if this rank's device waits for collectives, and with it any later
            call of this rank, without its knowledge.
        epoch: recoveries so far.
        fault: what the thread has found.
        statuses: what each rank last reported about itself.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        rank: int,
        size: int,
        stall_s: float,
        on_fault: Callable[[], None],
    ) -> None:
        """Start the thread.

        Args:
            connect: makes a client of the store; each thread needs its own.
            stall_s: longest silence of a rank, in seconds.
            on_fault: called in the thread when it finds a fault.
        """
        self.issued = 0
        self.share = (0, 0)
        self.waits_on_device = False
        self.epoch = 0
        self.fault: Fault | None = None
        self.statuses: list[dict[str, Any]] = [{} for _ in range(size)]
        self._rank, self._size, self._stall_s = rank, size, stall_s
        self._connect = connect
        self._on_fault = on_fault
        self._interval_s = min(1.0, stall_s / 20)
        self._ticks, self._state, self._where = 0, IDLE, BETWEEN_CALLS
        self._beats = 0
        self._work: Work | None = None
        self._work_ticks = 0
        # Ticks, and since when they have stood still while a fault is known.
        self._stuck = (0, time.monotonic())
        self._contact_at = time.monotonic()
        self._store_is_lost = False
        self._last_seen = [_LastSeen() for _ in range(size)]
        self._store = connect()
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="star-attention-watchdog", daemon=True
        )
        self._thread.start()

    # ------------------------------------------------------------------ the main thread

    def tick(self, where: str | None = None) -> None:
        """Report progress; `where` names what the rank does from now on."""
        self._ticks += 1
        if where is not None:
            self._where = where

    def set_state(self, state: str) -> None:
        if self._state != GONE:
            self._state = state
        self._ticks += 1

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Count CPU time as progress in the block, in which there may be no other for long.

        Args:
            what: what the rank does, for messages.
        """
        outer, before = self._work, self._where
        self._work = outer or Work(self._stall_s)
        where = f"{before}, {what}"
        self.tick(where)
        try:
            yield
        finally:
            self._work = outer
            self.tick(before if self._where == where else None)

    def leave(self, cause: str) -> None:
        """Stop taking part for good; the others get the known fault, or `cause` as this rank's."""
        self.fault = self.fault or Fault(rank=self._rank, where=self._where, cause=cause)
        self.set_state(GONE)
        if self._rank == 0:
            # The store ends with rank 0: without the reason the others would blame it.
            self._wait_until_read()

    @property
    def where(self) -> str:
        return self._where

    def report_failure(self, name: str, message: str) -> None:
        """Publish an exception of this rank; the first one of all ranks counts."""
        failure = json.dumps(
            {"rank": self._rank, "where": self._where, "name": name, "message": message}
        )
        try:
            self._store.compare_set(f"failure/{self.epoch}", "", failure)
        except Exception:
            # The store is gone, and so are those who would read it.
            return

    def meet(self) -> bool:
        """Wait for every rank to recover; return False if not all come within the stall limit."""
        deadline = time.monotonic() + self._stall_s
        keys = [f"met/{self.epoch}/{rank}" for rank in range(self._size)]
        try:
            self._store.set(keys[self._rank], "")
            while not self._store.check(keys):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.01)
        except Exception:
            return False
        self.epoch += 1
        self.fault = None
        return True

    def _wait_until_read(self) -> None:
        """Wait until every rank that still beats has read this rank's status."""
        deadline = time.monotonic() + 8 * self._interval_s

        def wait(done: Callable[[], bool]) -> None:
            while not done() and self._thread.is_alive() and time.monotonic() < deadline:
                time.sleep(self._interval_s / 10)

        # A beat may be half done when it is seen: the second one after it is whole.
        own = self._beats + 2
        wait(lambda: self._beats >= own)
        beats = [status.get("beat") for status in self.statuses]

        def has_read(rank: int) -> bool:
            beat, seen = beats[rank], self._last_seen[rank]
            left = self.statuses[rank].get("state") == GONE
            silent = self._contact_at - seen.beat_at > 3 * self._interval_s
            return beat is None or left or silent or self.statuses[rank]["beat"] >= beat + 2

        wait(lambda: all(has_read(rank) for rank in range(1, self._size)))

    def check(self) -> Fault | None:
        """Return the known fault. The thread itself may hang in the store's socket."""
        if self.fault is None and time.monotonic() - self._contact_at > self._stall_s:
            self.fault = self._unreachable()
        return self.fault

    def others_moved_at(self) -> float:
        """Return when a rank that does not wait for calls of rank 0 last moved.

        In its startup, which may be slow, each sign of life counts; later progress alone, since a
        rank in another call waits for rank 0 itself.
        """
        moved_at = [0.0]
        for rank, (status, seen) in enumerate(zip(self.statuses, self._last_seen, strict=True)):
            where = status.get("where", STARTUP)
            if rank != self._rank and where != FOLLOW:
                starts = where.startswith(STARTUP)
                moved_at.append(seen.beat_at if starts else seen.progress_at)
        return max(moved_at)

    def find_cause(self, cause: str) -> Fault:
        """Find out why a connection broke: the rank that died or failed.

        Waits until a rank has reported a failure or falls silent; returns `cause` if none does.
        """
        quiet_s = 4 * self._interval_s
        deadline = time.monotonic() + 2 * quiet_s
        while time.monotonic() < deadline and self.fault is None:
            time.sleep(self._interval_s / 4)
            if self._store_is_lost:
                # No rank's beats are seen any more.
                self.fault = self._unreachable()
                break
            # Who has left because of a rank is silent, too, but later.
            beat_at, rank = min((seen.beat_at, rank) for rank, seen in enumerate(self._last_seen))
            if self._contact_at - beat_at > quiet_s:
                self.fault = self._fault_of(rank, "it died: its connections closed")
        self.fault = self.check() or Fault(rank=None, where=self._where, cause=cause)
        return self.fault

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=2 * self._interval_s + 1)

    # ------------------------------------------------------------------ the watchdog thread

    def _watch(self) -> None:
        try:
            store = self._connect()
        except Exception:
            return
        while not self._closing.is_set():
            epoch = self.epoch
            try:
                failure = self._exchange_statuses(store, epoch)
            except Exception:
                # A client that has lost its store does not find it again, and torch would write a
                # page about every attempt.
                self._store_is_lost = True
                break
            if self.fault is None and epoch == self.epoch:
                self.fault = self._reported(failure) if failure else self._find_fault()
                if self.fault is not None:
                    self._on_fault()
            self._exit_if_stuck(self._contact_at)
            self._closing.wait(self._interval_s)
        ended = self.fault is not None
        while not self._closing.wait(self._interval_s):
            now = time.monotonic()
            if self.fault is None and now - self._contact_at > self._stall_s / 2:
                self.fault = self._unreachable()
            if self.fault is not None and not ended:
                self._on_fault()
                ended = True
            self._exit_if_stuck(now)
        try:
            if time.monotonic() - self._contact_at < 2 * self._interval_s:
                self._beats += 1
                store.set(f"status/{self._rank}", self._status(GONE))
        except Exception:
            return

    def _exchange_statuses(self, store: Any, epoch: int) -> bytes:
        """Write this rank's status, read all of them, and return the failure that was reported."""
        self._beats += 1
        work = self._work
        if work is not None and work.has_advanced():
            self._work_ticks += 1
        keys = [f"status/{rank}" for rank in range(self._size)]
        store.set(keys[self._rank], self._status(self._state))
        present = [key for key in keys if store.check([key])]
        texts = dict(zip(present, store.multi_get(present), strict=True))
        failure_key = f"failure/{epoch}"
        failure: bytes = store.get(failure_key) if store.check([failure_key]) else b""
        self._contact_at = now = time.monotonic()
        for rank, key in enumerate(keys):
            self.statuses[rank] = json.loads(texts.get(key, b"{}"))
            self._last_seen[rank].update(self.statuses[rank], now)
        return failure

    @property
    def _progress(self) -> int:
        return self._ticks + self._work_ticks

    def _status(self, state: str) -> str:
        """This rank's status as JSON; with the reason if it left because of a fault."""
        done, total = self.share
        status: dict[str, Any] = dict(
            beat=self._beats,
            ticks=self._progress,
            state=state,
            where=self._where,
            issued=self.issued,
            on_device=self.waits_on_device,
            done=done,
            total=total,
        )
        if state == GONE and self.fault is not None:
            status["fault"] = asdict(self.fault)
        return json.dumps(status)

    @staticmethod
    def _reported(failure: bytes) -> Fault:
        fields = json.loads(failure)
        return Fault(cause=f"{fields['name']}: {fields['message']}", **fields)

    def _find_fault(self) -> Fault | None:
        """Judge the other ranks by their statuses and last signs of life."""
        now = self._contact_at
        if self._state in (IDLE, GONE):
            return None
        hanging = []
        for rank in range(self._size):
            if rank == self._rank:
                continue
            status, last_seen = self.statuses[rank], self._last_seen[rank]
            if status.get("state") == GONE:
                fault = status.get("fault")
                return Fault(**fault) if fault else self._fault_of(rank, "it exited")
            if now - last_seen.beat_at > self._stall_s:
                cause = "it was killed or stopped, or the network is down"
                return self._fault_of(rank, f"no sign of life for {self._stall_s:g} s: {cause}")
            # Without recent beats it is not the work that is silent.
            beats = now - last_seen.beat_at < self._stall_s / 2
            if (
                beats
                and status.get("state") == BUSY
                and now - last_seen.progress_at > self._stall_s
            ):
                if self._waits_for_another(rank):
                    last_seen.progress_at = now
                else:
                    hanging.append(rank)
        if hanging:
            # On devices the others wait inside their work, too: the rank at fault is the one that
            # has started the fewest collectives.
            rank = min(hanging, key=lambda rank: self.statuses[rank].get("issued", 0))
            cause = f"it hangs: no progress for {self._stall_s:g} s"
            return self._fault_of(rank, cause, died=False)
        if all(status.get("state") == WAITING for status in self.statuses) and all(
            now - last_seen.progress_at > self._stall_s for last_seen in self._last_seen
        ):
            cause = f"all ranks have waited for each other for {self._stall_s:g} s"
            return Fault(
                rank=None, where=self._where, cause=f"{cause}: a link between them is down"
            )
        return None

    def _waits_for_another(self, rank: int) -> bool:
        """True if a silent rank's device waits for a rank that still has to come, and works."""
        own = self.statuses[rank]
        return bool(own.get("on_device")) and any(
            status.get("state") == BUSY
            and status.get("issued", 0) < own.get("issued", 0)
            and self._contact_at - last_seen.progress_at <= self._stall_s
            for status, last_seen in zip(self.statuses, self._last_seen, strict=True)
        )

    def _fault_of(self, rank: int, cause: str, *, died: bool = True) -> Fault:
        where = self.statuses[rank].get("where", self._where)
        if died and self._where != BETWEEN_CALLS:
            # The place of a dead rank is from before its end; this one waits for it in its call.
            where = self._where
        return Fault(rank=rank, where=where, cause=cause)

    def _unreachable(self) -> Fault:
        cause = "its store is unreachable: it was killed, or the network is down"
        return Fault(rank=0, where=self._where, cause=cause)

    def _exit_if_stuck(self, now: float) -> None:
        """End this process if its work hangs and so does not notice that the ranks failed."""
        rests = self._state in (IDLE, LEADING, GONE)
        if self.fault is None or rests or self._progress != self._stuck[0]:
            self._stuck = (self._progress, now)
        elif now - self._stuck[1] > self._stall_s:
            print(
                f"rank {self._rank}: error: stuck in {self._where};"
                " the other ranks have already failed, exiting",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
