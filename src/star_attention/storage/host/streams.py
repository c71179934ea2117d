"""Copies between host memory and a GPU on streams of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

TO_DEVICE, TO_HOST = "to the device", "to the host"
"""Directions, each with a stream: a link carries both at once."""

_MOST_BEHIND = 4
"""Writes under way at most. Each holds a copy of what it writes on the device."""


@cache
def copy_stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    """Return the stream on which a process copies to or from a GPU."""
    return torch.cuda.Stream(device)


class CudaTimeline:
    """A CUDA stream as a `Timeline`; its marks are events."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()


class Outbox:
    """Writes from a GPU to host memory, which it makes while it computes on.

    One context's layers share an outbox.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def write(self, targets: list[Tensor], parts: list[Tensor]) -> torch.cuda.Event:
        """Queue copies of tensors, after what computes them.

        Args:
            targets: host memory, `[G, S, ...]` each, of which every head's part is contiguous.
            parts: tensors on one GPU, of these shapes.

        Returns:
            An event for `wait`.
        """
        while len(self._pending) >= _MOST_BEHIND:
            self._pending.popleft()[0].synchronize()
        # Copies: compiled layers use the memory of their tensors again while the link is busy.
        sources = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        stream = copy_stream(parts[0].device, TO_HOST)
        stream.wait_stream(torch.cuda.current_stream(parts[0].device))
        with torch.cuda.stream(stream):
            for target, source in zip(targets, sources, strict=True):
                # A head at a time: torch copies only contiguous memory without waiting.
                for target_S, source_S in zip(target, source, strict=True):
                    target_S.copy_(source_S, non_blocking=True)
        event: torch.cuda.Event = stream.record_event()
        self._pending.append((event, [*sources, *targets]))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """Return once a write is done, and let go of all that are."""
        event.synchronize()
        while self._pending and self._pending[0][0].query():
            self._pending.popleft()

    def __del__(self) -> None:
        for event, _ in self._pending:
            event.synchronize()
