"""Seconds and peak device memory of a piece of work."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """A stopwatch that starts when it is made.

    On a GPU it waits for the work queued before and inside, so that the time is the work's own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Return the seconds so far, without waiting for the device."""
        return time.perf_counter() - self._started

    def stop(self) -> tuple[float, int | None]:
        """Return the seconds, and the peak bytes of device memory (None on a CPU)."""
        if self._device.type != "cuda":
            return self.elapsed(), None
        torch.cuda.synchronize(self._device)
        return self.elapsed(), torch.cuda.max_memory_allocated(self._device)


class Lap:
    """The time of work that begins when it is made; nothing waits for the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._marks = [self._mark()]

    def _mark(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        """Note the end of the work."""
        self._marks.append(self._mark())

    @property
    def seconds(self) -> float:
        """The time of the work; on a GPU once it is known to be done."""
        start, stop = self._marks
        return float(start.elapsed_time(stop) / 1000 if self._on_device else stop - start)
