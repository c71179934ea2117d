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
        self._least_s = _LEAST_WORK * stall_s
        self._ends_at = time.monotonic() + _MOST_WORK_S
        self._seen_s: float | None = None

    def has_advanced(self) -> bool:
        """True if it has used enough CPU time since this was last true."""
        now_s = work_seconds()
        # Less than before: the time of a process that has ended may be lost.
        if self._seen_s is None or now_s < self._seen_s:
            self._seen_s = now_s
        if now_s - self._seen_s < self._least_s or time.monotonic() > self._ends_at:
            return False
        self._seen_s = now_s
        return True


def work_seconds() -> float:
    """Return CPU seconds of this process and of all processes below it, but not of this thread.

    torch.compile runs Triton and C compilers in worker processes. Where there is no /proc, those
    count when they have ended.
    """
    times = os.times()
    ended = times.children_user + times.children_system
    return time.process_time() - time.thread_time() + ended + _below(os.getpid())


def _below(pid: int) -> float:
    """Return the CPU seconds of all living processes below one, and of their ended children."""
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
    total, waiting = 0.0, [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        total += sum(seconds[child] for child in below)
        waiting += below
    return total
