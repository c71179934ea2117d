"""CPU time of this process and of the processes that it started, as a sign of work."""

from __future__ import annotations

import os
import time
from pathlib import Path

_PROC = Path("/proc")

_LEAST_WORK = 0.02
"""CPU seconds per second that pass as work: threads that only wait use less."""
_MOST_WORK_S = 1800.0
"""Seconds after which CPU time no longer counts: a thread that waits for a device spins."""


class Work:
    """A piece of work of which nothing but its CPU time can be seen.

    Args:
        stall_s: seconds for which it may use no CPU time.
    """

    def __init__(self, stall_s: float) -> None:
        least_s = _LEAST_WORK * stall_s
        self._own, self._all = _Meter(least_s), _Meter(least_s)
        self._ends_at = time.monotonic() + _MOST_WORK_S

    def has_advanced(self) -> bool:
        """True if it has used enough CPU time since this was last true."""
        if time.monotonic() > self._ends_at:
            return False
        own_s = own_seconds()
        # While this process works in Python, each file of /proc waits for its lock: a look at all
        # processes would take seconds.
        return self._own.has_grown(own_s) or self._all.has_grown(own_s + seconds_below())


class _Meter:
    """Tells when a number of seconds has grown enough."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        # A first look counts as growth: the work has begun.
        self._seen_s = 0.0

    def has_grown(self, now_s: float) -> bool:
        """True if the number has grown by the least since this was last true."""
        # Less than before: the time of a process that has ended may be lost.
        self._seen_s = min(self._seen_s, now_s)
        if now_s - self._seen_s < self._least_s:
            return False
        self._seen_s = now_s
        return True


def own_seconds() -> float:
    """Return CPU seconds of this process and of those below it that have ended.

    Those of this thread are left out.
    """
    times = os.times()
    ended = times.children_user + times.children_system
    return time.process_time() - time.thread_time() + ended


def seconds_below() -> float:
    """Return the CPU seconds of all living processes below this one, and of their ended children.

    torch.compile runs Triton and C compilers in worker processes. Where there is no /proc, those
    count when they have ended.
    """
    children: dict[int, list[int]] = {}
    seconds: dict[int, float] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            # The name before may contain spaces and parentheses.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            # It has ended.
            continue
        child, parent = int(path.parent.name), int(fields[1])
        children.setdefault(parent, []).append(child)
        seconds[child] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        total += sum(seconds[child] for child in below)
        waiting += below
    return total
