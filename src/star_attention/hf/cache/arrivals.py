"""Layers in host memory as captured forwards read them: they arrive between two CUDA graphs.

A layer may arrive at one of several places. Between two graphs Python queues the copies that come
next, and lets the rest of the forward wait for the layer and read it where it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from star_attention.storage.kv import LayerKV, StoredKV
from star_attention.storage.transfers import sent

Interlude = Callable[[Callable[[], None]], None]
"""Lets Python do something at a place of captured work (`Recorder.interlude`)."""


class Arriving:
    """The layers of one context, and the table that says where they are.

    Args:
        layers: the context's layers; the table does not keep them.
        table: addresses of each layer, on the device: `[layers, columns]`.
        places: the whole table for each place at which layers may be, in host memory.
    """

    def __init__(self, layers: Sequence[LayerKV], table: Tensor, places: list[Tensor]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._table = table
        self._places = sent(torch.stack(places), table.device)

    def bring(self, index: int) -> None:
        """Let what is queued next find a layer, if it arrives."""
        layer = self._layers[index]()
        feeder = None if layer is None else layer.feeder
        if layer is not None and feeder is not None:
            self._table[index].copy_(self._places[feeder.bring(layer), index])


class Arrivals:
    """What arrives while a captured forward runs.

    Args:
        layers: indices of the cache layers that arrive.
        interlude: lets Python act between two graphs.
    """

    def __init__(self, layers: Sequence[int], interlude: Interlude) -> None:
        self.layers = frozenset(layers)
        self._interlude = interlude
        self._contexts: list[Arriving] = []

    def load(self, contexts: list[Arriving]) -> None:
        """Let forwards read other contexts from now on."""
        self._contexts = contexts

    def wait_for(self, index: int) -> None:
        """Let what is captured next wait for a layer, if it arrives."""
        if index in self.layers:
            self._interlude(partial(self._bring, index))

    def part(self) -> None:
        """Let another graph begin here, unless graphs end for layers that arrive."""
        if not self.layers:
            self._interlude(_nothing)

    def _bring(self, index: int) -> None:
        for context in self._contexts:
            context.bring(index)


def _nothing() -> None:
    pass


def arrives(layer: LayerKV) -> bool:
    """True if a layer is read where it arrives from host memory."""
    return layer.feeder is not None or layer.comes_from_host


def at_place(layer: LayerKV, place: int) -> StoredKV:
    """Return a layer's tensors at one of its places, or the last; where it is, if it stays."""
    feeder = layer.feeder
    if feeder is None:
        return layer.stored()
    places = feeder.places(layer)
    return places[min(place, len(places) - 1)]


def arriving(layers: Sequence[LayerKV]) -> tuple[int, ...]:
    """Return the indices of the layers that arrive from host memory."""
    # Before each forward, of contexts that are on the device as a rule: asked with few calls.
    far = [index for index, layer in enumerate(layers) if layer.on_host or layer.feed is not None]
    return tuple(index for index in far if arrives(layers[index]))


def count_places(layers: Sequence[LayerKV]) -> int:
    """Return the most places at which a layer may arrive; 1 if none does."""
    feeders = [(layer, layer.feeder) for layer in layers if layer.feed is not None]
    return max((len(feeder.places(layer)) for layer, feeder in feeders if feeder), default=1)
