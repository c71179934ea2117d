"""Buffers that layers take turns in: none is overwritten while it is read, or read too early."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention.storage.host.carousel import Carousel
from tests.timelines import FakeTimeline, World


class Recorder:
    """Buffers whose every copy and read takes a while, and fails if it is disturbed."""

    def __init__(self, layers: int, buffers: int, seed: int) -> None:
        self.world = World(seed)
        self.copies, self.reader = self.world.timeline(), self.world.timeline()
        self.versions = [0] * layers
        self.content: list[tuple[int, int] | None] = [None] * buffers
        self.busy = [0] * buffers
        self.filled = self.reads = 0
        self.carousel = Carousel(
            range(layers),
            buffers,
            copies=self.copies,
            fill=self._fill,
            reader=self.reader,
        )

    def _fill(self, buffer: int, layer: int) -> None:
        # Called while the timeline runs: what it queues comes next.
        version = self.versions[layer]
        self.copies.queue.extendleft(
            [lambda: self._end_of_copy(buffer, layer, version), lambda: self._copy(buffer)]
        )

    def _copy(self, buffer: int) -> None:
        assert not self.busy[buffer], "overwritten while it is read"
        self.busy[buffer] += 1
        self.content[buffer] = None

    def _end_of_copy(self, buffer: int, layer: int, version: int) -> None:
        self.busy[buffer] -= 1
        self.content[buffer] = layer, version
        self.filled += 1

    def read(self, layer: int, times: int = 1, reader: FakeTimeline | None = None) -> None:
        reader = reader or self.reader
        buffer = self.carousel.take(layer, reader)
        expected = layer, self.versions[layer]
        for _ in range(times):
            reader.run(lambda: self._read(buffer, expected))
            reader.run(lambda: self._end_of_read(buffer, expected))
        self.world.run_some()

    def _read(self, buffer: int, expected: tuple[int, int]) -> None:
        assert self.content[buffer] == expected, "read before it is filled"
        self.busy[buffer] += 1

    def _end_of_read(self, buffer: int, expected: tuple[int, int]) -> None:
        assert self.content[buffer] == expected, "overwritten while it was read"
        self.busy[buffer] -= 1
        self.reads += 1

    def end(self) -> None:
        self.carousel.finish()
        assert not any(self.busy)
        self.world.run_all()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=40),
    st.integers(1, 4),
    st.integers(0, 2**16),
    st.sets(st.integers(0, 40)),
)
def test_any_order_reads_the_right_layers(
    order: list[int], buffers: int, seed: int, changes: set[int]
) -> None:
    """Layers may change between forwards, be read twice in a row, or on another stream."""
    recorder = Recorder(6, buffers, seed)
    other = recorder.world.timeline()
    for number, layer in enumerate(order):
        if number in changes:
            # Python waits for a device before it changes what that copies.
            recorder.world.run_all()
            recorder.versions[layer] += 1
            recorder.carousel.forget(layer)
        recorder.read(layer, times=2, reader=other if number % 3 == 0 else None)
    recorder.end()
    assert recorder.reads == 2 * len(order)


def copies(layers: int, buffers: int, order: Sequence[int]) -> list[int]:
    """Return the copies after each read of an order."""
    recorder, counts = Recorder(layers, buffers, 0), []
    for layer in order:
        recorder.read(layer)
        recorder.world.run_all()
        counts.append(recorder.filled)
    return counts


def test_the_next_layers_are_copied_while_one_is_read() -> None:
    assert copies(6, 2, [0, 1, 2]) == [2, 3, 4]
    assert copies(6, 3, [0, 1, 2]) == [3, 4, 5]
    # The first layers of the next forward, too: each forward copies each layer once.
    assert copies(4, 3, 3 * [0, 1, 2, 3])[-1] == 3 * 4 + 2


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_that_fit_are_copied_once(layers: int) -> None:
    assert copies(layers, 3, 4 * list(range(layers)))[-1] == layers


def test_layers_that_are_read_again_are_not_copied_again() -> None:
    """Layers that share the keys of two others read these in turn."""
    forward = [0, 1, 2, 3, 2, 3, 2, 3, 2, 3]
    assert copies(4, 3, 10 * forward)[-1] <= 10 * 7


def test_it_copies_before_the_reader_has_got_there() -> None:
    """The link works while the reader is busy with the layer before."""
    recorder = Recorder(6, 2, 0)
    recorder.world.run_all()
    recorder.carousel.take(0, recorder.reader)
    while recorder.copies.is_ready():
        recorder.copies.step()
    assert recorder.filled == 2
    assert recorder.reader.queue
