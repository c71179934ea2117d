"""The layers of a context in host memory on their way to a device, ahead of their use.

Axes: G KV heads, L tokens, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from star_attention.planning.residency import BUFFERS
from star_attention.storage.host.carousel import Carousel, Timeline
from star_attention.storage.host.streams import TO_DEVICE, CudaTimeline, copy_stream
from star_attention.storage.oom import allocate, is_out_of_memory

if TYPE_CHECKING:
    from star_attention.storage.kv import ContextKV, Feeder, LayerKV, StoredKV

_ALIGNED = 256
"""Bytes to whose multiples a tensor is aligned in a buffer."""


class _Slots:
    """The buffers on the device, and the layers that take turns in them."""

    def __init__(self, layers: list[LayerKV], device: torch.device) -> None:
        self.layers = layers
        nbytes = max(sum(map(_aligned, layer.stored())) for layer in layers)
        self.buffers = _buffers(nbytes, min(BUFFERS, len(layers)), device)
        self._views: dict[tuple[int, int], StoredKV] = {}

    def view(self, buffer: int, number: int) -> StoredKV:
        """Return the tensors of a layer in a buffer."""
        views = self._views.get((buffer, number))
        if views is None:
            views = tuple(_views(self.buffers[buffer], self.layers[number].stored()))
            self._views[buffer, number] = views
        return views

    def fill(self, buffer: int, number: int) -> None:
        """Queue the copy of a layer into a buffer."""
        stored = self.layers[number].stored()
        for target, source in zip(self.view(buffer, number), stored, strict=True):
            target.copy_(source, non_blocking=True)


class Feed:
    """Brings the layers of one context to one device, while that computes.

    Layers know their feed as long as somebody keeps it, an answer's cache for instance. It takes
    the memory of `BUFFERS` layers; of two, if there is too little.

    Args:
        layers: the layers in host memory, in their order.
        device: the device.
        copies: queues copies there.
        reader: returns the queue of the work that reads layers, whoever asks.
    """

    def __init__(
        self,
        layers: list[LayerKV],
        device: torch.device,
        *,
        copies: Timeline,
        reader: Callable[[], Timeline],
    ) -> None:
        self._reader = reader
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        # Nothing refers to the feed itself: its memory does not wait for the garbage collector.
        self._slots = slots = _Slots(layers, device)
        self._carousel = Carousel(
            range(len(layers)),
            len(slots.buffers),
            copies=copies,
            fill=slots.fill,
            reader=reader(),
        )
        for layer in layers:
            layer.feed = weakref.ref(self)

    def take(self, layer: LayerKV) -> StoredKV:
        """Return a layer's stored tensors on the device, for work that is queued until the next."""
        return self._slots.view(self.bring(layer), self._numbers[id(layer)])

    def bring(self, layer: LayerKV) -> int:
        """Bring a layer as `take` does, and return which of its `places` it is at."""
        return self._carousel.take(self._numbers[id(layer)], self._reader())

    def places(self, layer: LayerKV) -> list[StoredKV]:
        """Return a layer's tensors at each place on the device where it may arrive."""
        number = self._numbers[id(layer)]
        return [self._slots.view(buffer, number) for buffer in range(len(self._slots.buffers))]

    def forget(self, layer: LayerKV) -> None:
        """Bring a layer again, which has changed."""
        self._carousel.forget(self._numbers[id(layer)])

    def __del__(self) -> None:
        # Memory on both sides may serve something else from now on.
        if hasattr(self, "_carousel"):
            self._carousel.finish()


def feeds_of(kv: ContextKV) -> list[Feeder]:
    """Return what brings a context's layers to their devices; to be kept as long as it is read.

    There is nothing where no layer is in host memory, or where layers are read on the CPU.
    """
    by_device: dict[torch.device, list[LayerKV]] = {}
    feeds: list[Feeder] = []
    for layer in kv.layers:
        feed = None if layer.feed is None else layer.feed()
        if feed is not None:
            feeds += [feed] if feed not in feeds else []
        elif layer.comes_from_host:
            by_device.setdefault(layer.reads_on, []).append(layer)
    for device, layers in by_device.items():
        copies = CudaTimeline(copy_stream(device, TO_DEVICE))
        feeds.append(Feed(layers, device, copies=copies, reader=partial(_current, device)))
    return feeds


def _current(device: torch.device) -> CudaTimeline:
    return CudaTimeline(torch.cuda.current_stream(device))


def _buffers(nbytes: int, count: int, device: torch.device) -> list[Tensor]:
    """Allocate buffers: `count`, or two if there is too little memory for more."""

    def make(count: int) -> list[Tensor]:
        flat = allocate(lambda: torch.empty(count, nbytes, dtype=torch.uint8, device=device))
        return list(flat)

    try:
        return make(count)
    except (MemoryError, RuntimeError) as error:
        if count <= 2 or not is_out_of_memory(error):
            raise
    return make(2)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _views(buffer: Tensor, like: Iterable[Tensor]) -> Iterable[Tensor]:
    """Yield tensors in a buffer, with dtypes and shapes of others."""
    at = 0
    for tensor in like:
        nbytes = tensor.numel() * tensor.element_size()
        yield buffer[at : at + nbytes].view(tensor.dtype).view(tensor.shape)
        at += _aligned(tensor)
