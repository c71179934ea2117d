"""Contexts that wait in host memory, and come back to their device a layer at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from star_attention.storage.context import EncodedContext
from star_attention.storage.kv import ContextKV, StoredKV
from star_attention.storage.oom import allocate, translate_oom


@dataclass(frozen=True, kw_only=True)
class ParkedLayer:
    """One layer's tensors in host memory.

    Attributes:
        tensors: the tensors, as stored.
        device: where they came from.
    """

    tensors: StoredKV
    device: torch.device

    def back(self) -> StoredKV:
        """Return copies of the tensors on their device, which makes them in its own time."""
        # Where both are the same device, a copy too: whoever parks a context wants it to move.
        with translate_oom(lambda: "out of memory while a context came back from host memory"):
            return tuple(
                allocate(partial(tensor.to, self.device, non_blocking=True, copy=True))
                for tensor in self.tensors
            )


class ParkedContext:
    """A context's keys and values in host memory, all layers. Nothing changes them.

    Args:
        context: the context, on its device; its keys and values are not referred to.
        layers: those of each layer; None for one that reads another's.
    """

    def __init__(self, context: EncodedContext, layers: list[ParkedLayer | None]) -> None:
        self._layers = layers
        kv = context.kv
        parked = [
            layer.elsewhere(None if own is None else partial(_tensors, own))
            for layer, own in zip(kv.layers, layers, strict=True)
        ]
        self._on_host = replace(context, kv=ContextKV(parked, kv.segments, kv.visible))

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return sum(map(host_bytes, (t for layer in self._layers if layer for t in layer.tensors)))

    def on_host(self) -> EncodedContext:
        """Return the context as it is, to be saved."""
        return self._on_host

    def back(self) -> EncodedContext:
        """Return the context on its device; each layer is copied when it is first used."""
        kv = self._on_host.kv
        moved = [
            layer.elsewhere(None if own is None else own.back)
            for layer, own in zip(kv.layers, self._layers, strict=True)
        ]
        return replace(self._on_host, kv=ContextKV(moved, kv.segments, kv.visible))


def _tensors(layer: ParkedLayer) -> StoredKV:
    return layer.tensors


class Parking:
    """Copies a context to host memory, a layer at a time.

    Args:
        context: the context.
    """

    def __init__(self, context: EncodedContext) -> None:
        self._context: EncodedContext | None = context
        self._layers: list[ParkedLayer | None] = []
        self._copied: list[torch.cuda.Event] = []

    @property
    def done(self) -> bool:
        """True once all layers are there."""
        return not self._left and all(event.query() for event in self._copied)

    @property
    def _left(self) -> int:
        assert self._context is not None, "it was canceled"
        return len(self._context.kv.layers) - len(self._layers)

    def advance(self) -> None:
        """Copy a layer, which the device does in its own time.

        Raises:
            OutOfMemoryError: there is too little host memory.
        """
        if not self._left:
            return
        assert self._context is not None, "it was canceled"
        layer = self._context.kv.layers[len(self._layers)]
        if layer.is_empty:
            self._layers.append(None)
        else:
            with translate_oom(lambda: "out of host memory while a context was moved there"):
                stored = layer.stored()
                copies = tuple(map(_to_host, stored))
            self._layers.append(ParkedLayer(tensors=copies, device=stored[0].device))
        if not self._left:
            devices = {layer.device for layer in self._layers if layer is not None}
            self._copied = [_event(device) for device in devices if device.type == "cuda"]

    def result(self) -> ParkedContext:
        """Return the copy, once it is done."""
        assert self._context is not None, "it was canceled"
        for event in self._copied:
            event.synchronize()
        return ParkedContext(self._context, self._layers)

    def cancel(self) -> None:
        """Drop what has been copied."""
        self._context, self._layers = None, []


def _to_host(tensor: Tensor) -> Tensor:
    # From other host memory a GPU cannot copy while it computes.
    copy = allocate(
        lambda: torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
        )
    )
    return copy.copy_(tensor, non_blocking=True)


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def host_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in host memory, or would take there.

    torch allocates pinned memory in powers of two.
    """
    nbytes = tensor.numel() * tensor.element_size()
    is_pinned = tensor.is_cuda or tensor.is_pinned()
    return 1 << max(0, nbytes - 1).bit_length() if is_pinned else nbytes
