"""Progress of a run: a line every few seconds, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from star_attention.evals.runs.jobs import Job
from star_attention.evals.runs.variants import Variant

Progress = Callable[[str], None]
"""Shows one line."""

_INTERVAL_S = 5.0


class ProgressReporter:
    """Reports answers done and the time left, estimated from the tokens of context."""

    def __init__(self, jobs: Sequence[Job], progress: Progress | None) -> None:
        self._progress = progress
        self._total = sum(len(job.samples) for job in jobs)
        self._tokens_left = sum(job.tokens for job in jobs)
        self._done = 0
        self._tokens_done = 0
        self._started = self._last_report = time.monotonic()

    def job_done(self, job: Job, variant: Variant) -> None:
        """Count a job, and report at intervals and after the last one."""
        self._done += len(job.samples)
        self._tokens_done += job.tokens
        self._tokens_left -= job.tokens
        now = time.monotonic()
        is_last = self._done == self._total
        if self._progress is None or (now - self._last_report < _INTERVAL_S and not is_last):
            return
        self._last_report = now
        elapsed = now - self._started
        status = f"in {duration(elapsed)}"
        if not is_last:
            remaining = elapsed / self._tokens_done * self._tokens_left
            status = f"{variant.name}, ETA {duration(remaining)}"
        self._progress(f"{self._done:,} of {self._total:,} answers, {status}")


def duration(seconds: float) -> str:
    """Format seconds: `42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
