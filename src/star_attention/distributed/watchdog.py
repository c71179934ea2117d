"""Whether the other ranks are alive and get on, through a store beside the collectives.

Each rank has a thread that writes a line about itself to the store several times within the stall limit and reads the
others' lines. The limit is on silence, not on time: a rank that reports a layer now and then may take as long as it needs.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

IDLE, BUSY, WAITING, GONE = "idle", "busy", "waiting", "gone"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why the ranks cannot go on: the rank at fault (None where it is not one rank), and the cause.

    `name` and `message` are those of the exception, where the rank raised one.
    """

    rank: int | None
    where: str
    cause: str
    name: str | None = None
    message: str = ""


class Watch:
    """The thread of one rank. `tick` is called by the work itself, `fault` is what the thread found out.

    connect: makes a client of the store. stall_s: longest silence. on_fault: called in the thread when it finds one.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        rank: int,
        size: int,
        stall_s: float,
        on_fault: Callable[[], None],
    ) -> None:
        self.rank, self.size, self.stall_s = rank, size, stall_s
        self._connect = connect
        self._on_fault = on_fault
        self._interval = min(1.0, stall_s / 20)
        self._ticks, self._state, self._where = 0, IDLE, "between calls"
        self._beats = 0
        self.issued = 0  # collectives of this call
        self.share = (0, 0)  # how much of its share this rank has done, and of how much
        self.epoch = 0
        self.fault: Fault | None = None
        self.lines: list[dict[str, Any]] = [{} for _ in range(size)]
        self._stuck = (
            0,
            time.monotonic(),
        )  # ticks, and since when they stand still with a fault known
        self._contact = time.monotonic()
        self._heard = [
            (time.monotonic(), time.monotonic(), "", "")
        ] * size  # when a beat, a move; which
        self._store = connect()  # of the work's own thread; the watching thread has another
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="star-attention-watch", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ what the work tells

    def tick(self, where: str | None = None) -> None:
        """The work got on; `where` says with what."""
        self._ticks += 1
        if where is not None:
            self._where = where

    def state(self, state: str) -> None:
        if self._state != GONE:
            self._state = state
        self._ticks += 1

    def leave(self, cause: str) -> None:
        """This rank takes part in nothing any more: the others are told the fault that it knows, or `cause`."""
        self.fault = self.fault or Fault(rank=self.rank, where=self._where, cause=cause)
        self.state(GONE)

    @property
    def where(self) -> str:
        return self._where

    # ------------------------------------------------------------------ failures that are told

    def tell_failure(self, name: str, message: str) -> None:
        """Make an exception of this rank known; the first one of all ranks counts."""
        said = json.dumps(
            {"rank": self.rank, "where": self._where, "name": name, "message": message}
        )
        try:
            self._store.compare_set(f"failure/{self.epoch}", "", said)
        except Exception:  # the store is gone, and so are those who would read it
            return

    def meet(self, name: str) -> bool:
        """Whether every rank comes within the stall limit."""
        deadline = time.monotonic() + self.stall_s
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], "")
            while time.monotonic() < deadline:
                if self._store.check(keys):
                    return True
                time.sleep(0.01)
        except Exception:
            return False
        return False

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            store = self._connect()
        except Exception:
            return
        keys = [f"line/{rank}" for rank in range(self.size)]
        while not self._closing.is_set():
            self._beats += 1
            epoch = self.epoch
            try:
                store.set(keys[self.rank], self._line(self._state))
                here = [key for key in keys if store.check([key])]
                said = dict(zip(here, store.multi_get(here), strict=True))
                failure = f"failure/{epoch}"
                failed = store.get(failure) if store.check([failure]) else b""
            except Exception:
                # A client that has lost its store finds it no more, and torch would write a page about every attempt.
                break
            self._contact = now = time.monotonic()
            for rank, key in enumerate(keys):
                self.lines[rank] = other = json.loads(said.get(key, b"{}"))
                beat, move = str(other.get("beat")), f"{other.get('ticks')} {other.get('state')}"
                last_beat, last_move, old_beat, old_move = self._heard[rank]
                self._heard[rank] = (
                    last_beat if beat == old_beat else now,
                    last_move if move == old_move else now,
                    beat,
                    move,
                )
            if self.fault is None and epoch == self.epoch:
                self.fault = self._told(failed) if failed else self._silent(now)
                if self.fault is not None:
                    self._on_fault()
            self._end_if_stuck(now)
            self._closing.wait(self._interval)
        while not self._closing.wait(self._interval):
            self._lost_contact()
            self._end_if_stuck(time.monotonic())
        try:
            if time.monotonic() - self._contact < 2 * self._interval:
                self._beats += 1
                store.set(keys[self.rank], self._line(GONE))
        except Exception:
            return

    def _line(self, state: str) -> str:
        """What this rank says about itself; why it left, where it did so because of a fault."""
        done, total = self.share
        line: dict[str, Any] = dict(
            beat=self._beats,
            ticks=self._ticks,
            state=state,
            where=self._where,
            issued=self.issued,
            done=done,
            total=total,
        )
        if state == GONE and self.fault is not None:
            line["fault"] = asdict(self.fault)
        return json.dumps(line)

    def _told(self, failed: bytes) -> Fault:
        said = json.loads(failed)
        cause = f"{said['name']}: {said['message']}"
        return Fault(
            rank=said["rank"],
            where=said["where"],
            cause=cause,
            name=said["name"],
            message=said["message"],
        )

    def _silent(self, now: float) -> Fault | None:
        if self._state in (IDLE, GONE):
            return None
        others = [rank for rank in range(self.size) if rank != self.rank]
        hanging = []
        for rank in others:
            line = self.lines[rank]
            where, state = line.get("where", "before its first call"), line.get("state")
            if state == GONE:
                return Fault(
                    **line.get("fault") or dict(rank=rank, where=where, cause="it has ended")
                )
            if now - self._heard[rank][0] > self.stall_s:
                return Fault(
                    rank=rank,
                    where=where,
                    cause=f"no sign of life for {self.stall_s:g} s: it was killed or stopped, or the network is cut",
                )
            here = (
                now - self._heard[rank][0] < self.stall_s / 2
            )  # else it is not the work that is silent
            if here and state == BUSY and now - self._heard[rank][1] > self.stall_s:
                hanging.append(rank)
        if hanging:
            # On devices the others wait inside of their work: the one at fault has not come as far as they.
            rank = min(hanging, key=lambda rank: self.lines[rank].get("issued", 0))
            where = self.lines[rank].get("where", "")
            return Fault(
                rank=rank, where=where, cause=f"it hangs: no progress for {self.stall_s:g} s"
            )
        if all(line.get("state") == WAITING for line in self.lines) and all(
            now - moved > self.stall_s for _, moved, _, _ in self._heard
        ):
            return Fault(
                rank=None,
                where=self._where,
                cause=f"all ranks have waited for each other for {self.stall_s:g} s: a link between them is cut",
            )
        return None

    def _end_if_stuck(self, now: float) -> None:
        """Leave no process behind: where the ranks have given up and this one does not notice, because its work hangs."""
        if self.fault is None or self._state in (IDLE, GONE) or self._ticks != self._stuck[0]:
            self._stuck = (self._ticks, now)
        elif now - self._stuck[1] > self.stall_s:
            print(
                f"rank {self.rank}: error: it hangs in {self._where}, and the others have given it up: ended",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _lost_contact(self) -> None:
        if self.fault is None and time.monotonic() - self._contact > self.stall_s / 2:
            self.fault = self.unreachable()

    def unreachable(self) -> Fault:
        return Fault(
            rank=0,
            where=self._where,
            cause="its store cannot be reached: it was killed, or the network is cut",
        )

    def check(self) -> Fault | None:
        """What is known to be wrong, from the work's own thread (the other one may hang in the store's socket)."""
        if self.fault is None and time.monotonic() - self._contact > self.stall_s:
            self.fault = self.unreachable()
        return self.fault

    def suspect(self, cause: str) -> Fault:
        """After a connection broke: the rank that has told why, or that falls silent now; `cause` where none does."""
        quiet_s = 4 * self._interval
        deadline = time.monotonic() + 2 * quiet_s
        while time.monotonic() < deadline and self.fault is None:
            time.sleep(self._interval / 4)
            for rank, (beat, *_) in enumerate(self._heard):
                if rank != self.rank and time.monotonic() - beat > quiet_s:
                    where = self.lines[rank].get("where", "its first call")
                    self.fault = Fault(
                        rank=rank, where=where, cause="it died: its connections are closed"
                    )
                    break
        self.fault = self.check() or Fault(rank=None, where=self._where, cause=cause)
        return self.fault

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=2 * self._interval + 1)
