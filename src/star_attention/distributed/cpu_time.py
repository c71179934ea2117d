"""CPU time of this process and of the processes that it started, as a sign of work."""

from __future__ import annotations

import os
import time
from pathlib import Path

_PROC = Path("/proc")


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
