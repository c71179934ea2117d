"""Which layer is in which of a few buffers, and when a buffer may be filled again.

Layers are read in turn, over and over, from buffers that hold only some of them. While a reader
works on one layer, the next ones are copied into the other buffers. Copies and reads are queued on
two timelines, which run by themselves and wait for each other only at marks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Mark(Protocol):
    """A place in a timeline (a CUDA event)."""

    def synchronize(self) -> None:
        """Return once all work before it is done."""


class Timeline(Protocol):
    """A queue of work that runs in order, beside others (a CUDA stream)."""

    def mark(self) -> Mark:
        """Return a mark of all work queued so far."""

    def wait(self, mark: Any) -> None:
        """Let work that is queued from now on begin after a mark of any timeline."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what `work` queues."""


class Carousel:
    """Brings layers into buffers ahead of their use.

    Args:
        order: numbers of the layers, in the order in which they are expected to be read.
        buffers: number of buffers; two copy one layer ahead, three two.
        copies: where copies are queued.
        fill: queues the copy of a layer into a buffer, given the buffer and the layer.
        reader: where work that was queued so far may still use the buffers' memory.
    """

    def __init__(
        self,
        order: Sequence[int],
        buffers: int,
        *,
        copies: Timeline,
        fill: Callable[[int, int], None],
        reader: Timeline,
    ) -> None:
        self._next = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        buffers = min(buffers, len(self._next))
        self._copies, self._fill_buffer = copies, fill
        # Of each buffer: its layer, when its reads end, and when it is full.
        self._held: list[int | None] = [None] * buffers
        self._read: list[Mark] = [reader.mark()] * buffers
        self._filled: list[Mark | None] = [None] * buffers
        # The buffer that is being read, and by whom; and its layer.
        self._in_use: tuple[int, Timeline] | None = None
        self._last: int | None = None

    def take(self, layer: int, reader: Timeline) -> int:
        """Return the buffer with a layer, for work that is queued before the next call.

        Args:
            layer: number of the layer. Any order is right, the one of last time is fast.
            reader: where this work is queued. It waits there for the layer.
        """
        self._end_reading()
        if self._last is not None:
            # Models may read a layer again, for others that share its keys.
            self._next[self._last] = layer
        self._last = layer
        buffer = self._bring(layer, keep=[])
        self._in_use = buffer, reader
        reader.wait(self._filled[buffer])
        # After earlier readers, too, so that one mark stands for all.
        reader.wait(self._read[buffer])
        ahead = [layer]
        while len(ahead) < len(self._held):
            ahead.append(self._next[ahead[-1]])
            self._bring(ahead[-1], keep=ahead)
        return buffer

    def forget(self, layer: int) -> None:
        """Drop a layer that has changed: it is copied again when it is taken."""
        if layer in self._held:
            self._held[self._held.index(layer)] = None

    def finish(self) -> None:
        """Return once all copies and reads are done."""
        self._end_reading()
        for mark in (*self._filled, *self._read):
            if mark is not None:
                mark.synchronize()

    def _end_reading(self) -> None:
        if self._in_use is not None:
            buffer, reader = self._in_use
            self._read[buffer] = reader.mark()
            self._in_use = None

    def _bring(self, layer: int, keep: list[int]) -> int:
        """Return the buffer with a layer, after queueing its copy if there is none.

        Layers in `keep` stay where they are.
        """
        if layer in self._held:
            return self._held.index(layer)
        buffer = next(
            index
            for index, held in enumerate(self._held)
            if held not in keep and (self._in_use is None or index != self._in_use[0])
        )
        self._copies.wait(self._read[buffer])
        self._copies.run(lambda: self._fill_buffer(buffer, layer))
        self._filled[buffer] = self._copies.mark()
        self._held[buffer] = layer
        return buffer
