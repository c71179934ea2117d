"""Measurements on several ranks: those of all ranks together, and those of rank 0 alone.

Every rank runs the same benchmark. What rank 0 measures alone the others leave out; they wait for
it in the next measurement that all make.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from star_attention.distributed import Comm
from star_attention.errors import first_line
from star_attention.tools import machine

T = TypeVar("T")

OUT_OF_MEMORY = "out of memory"
NOT_HERE = "measured by rank 0"
"""The reason of a row without numbers on the ranks that wait."""
_ATTEMPTS = 3
_CELL = 40


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a piece of work took.

    Attributes:
        seconds: until the last rank had finished.
        peak_bytes: peak device memory of each rank; None where it is not measured (CPU).
        wire_bytes: bytes that the ranks exchanged, all together.
    """

    seconds: float
    peak_bytes: tuple[int, ...] | None = None
    wire_bytes: int = 0


def measure(work: Callable[[], object], device: torch.device, comm: Comm) -> Spent:
    """Time a piece of work that all ranks of `comm` do, from the moment when all are ready.

    Collective. The result of the work is freed.
    """
    # Garbage of an earlier row would count, and collecting it would make a rank late.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _together(comm):
        comm.gather(None)
    before = wire_bytes(comm)
    seconds = machine.time_once(work, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    wire = wire_bytes(comm) - before
    with _together(comm):
        spent = comm.gather((seconds, peak))
    peaks = tuple(peak for _, peak in spent if peak is not None)
    return Spent(
        seconds=max(seconds for seconds, _ in spent), peak_bytes=peaks or None, wire_bytes=wire
    )


def wire_bytes(comm: Comm) -> int:
    """Return the bytes that the ranks have exchanged so far, all together."""
    return comm.cp_traffic.bytes + comm.tp_traffic.bytes * comm.cp_size


def attempt(comm: Comm, work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Do work that all ranks of `comm` do. Collective.

    Returns:
        The result, or None and the reason if the work failed on any rank.

    Raises:
        RankError: the ranks cannot continue.
    """
    result: T | None = None
    reason: str | None = None
    try:
        result = work()
    except Exception as error:
        reason = _reason(error)
    # Tensors of a failed row are garbage now.
    gc.collect()
    for remaining in reversed(range(_ATTEMPTS)):
        try:
            with _together(comm):
                reasons = [text for text in comm.gather(reason) if text is not None]
            return (None, reasons[0]) if reasons else (result, None)
        except Exception as error:
            # The failure of another rank, met here; the ranks have recovered unless it was fatal.
            if not remaining:
                raise
            reason = reason or _reason(error)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def _together(comm: Comm) -> Iterator[None]:
    with comm.collective("a benchmark"):
        yield


def in_short(failed: str | None) -> str:
    """Return the reason of a failure for a cell of a table; the JSON has all of it."""
    reason = failed or ""
    return reason if len(reason) <= _CELL else f"{reason[: _CELL - 3]}..."


def _reason(error: Exception) -> str:
    """Describe a failure in a few words, and free the variables of its frames."""
    traceback.clear_frames(error.__traceback__)
    if isinstance(error, machine.OUT_OF_MEMORY) or "OutOfMemoryError" in str(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {first_line(error)}"[:200]
