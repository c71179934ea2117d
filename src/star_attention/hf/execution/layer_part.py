"""Forwards through some of a decoder's layers, where another rank runs the others.

Layers that do not run pass hidden states on, so that the decoder's own code stays as it is.

Axes: B batch, S tokens, E elements of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers: members of its module lists that contain attention."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return [
        layer
        for layers in lists
        for layer in layers
        if any(hasattr(module, "layer_idx") for module in layer.modules())
    ]


@dataclass(frozen=True, kw_only=True)
class HiddenShape:
    """The hidden states that decoder layers take and return, `[B, S, E]`.

    Attributes:
        elements: E.
        dtype: their precision.
    """

    elements: int
    dtype: torch.dtype

    @classmethod
    def of(cls, before: Any, after: Any) -> HiddenShape | None:
        """Return the shape of what a layer takes and returns; None if that is something else."""
        shapes = {
            (tensor.shape, tensor.dtype) if isinstance(tensor, Tensor) else None
            for tensor in (before, after)
        }
        if len(shapes) > 1 or before is None or before.dim() != 3:
            return None
        return cls(elements=before.shape[-1], dtype=before.dtype)


@contextmanager
def replaced(layers: list[nn.Module], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Give layers other forwards for the length of the block."""
    before: list[Any] = [vars(layer).get("forward") for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is not None:
                layer.forward = forward
            else:
                del layer.forward


class LayerPart:
    """The layers `first..stop` of a decoder, for a forward.

    Args:
        layers: the decoder's layers.
        first: first layer that runs.
        stop: one after the last layer that runs; None for all.
        hidden_BSE: what the first layer takes, if layers before it do not run.

    Attributes:
        ended_BSE: what the layer after the last one takes, once the forward has run.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        first: int = 0,
        stop: int | None = None,
        hidden_BSE: Tensor | None = None,
    ) -> None:
        self.first, self.stop = first, len(layers) if stop is None else stop
        self.ended_BSE: Tensor | None = None
        self._layers, self._hidden_BSE = layers, hidden_BSE

    @property
    def is_last(self) -> bool:
        """True if the last layer runs."""
        return self.stop == len(self._layers)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Install the part for the length of the block."""
        forwards = [self._forward(index, layer) for index, layer in enumerate(self._layers)]
        with replaced(self._layers, forwards):
            yield

    def _forward(self, index: int, layer: Any) -> Callable[..., Any]:
        if not self.first <= index < self.stop:
            return self._passing(index)
        if index == self.first and self._hidden_BSE is not None:
            return self._beginning(layer.forward, self._hidden_BSE)
        forward: Callable[..., Any] = layer.forward
        return forward

    def _passing(self, index: int) -> Callable[..., Any]:
        def forward(hidden_BSE: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == self.stop:
                self.ended_BSE = hidden_BSE
            return hidden_BSE

        return forward

    @staticmethod
    def _beginning(inner: Callable[..., Any], begun_BSE: Tensor) -> Callable[..., Any]:
        def forward(hidden_BSE: Tensor, *args: Any, **kwargs: Any) -> Any:
            return inner(begun_BSE, *args, **kwargs)

        return forward


def _index(module: Any) -> Any:
    return getattr(module, "layer_idx", None)


class HiddenStates:
    """Watches what a decoder's layers take and return, in a forward of all of them.

    Args:
        decoder: the decoder.
        cache_layers: layers of its cache.
    """

    def __init__(self, decoder: nn.Module, cache_layers: int) -> None:
        self._layers = layers_of(decoder)
        self._seen: list[HiddenShape | None] = []
        indices = [
            {index for module in layer.modules() if isinstance(index := _index(module), int)}
            for layer in self._layers
        ]
        self._in_order = indices == [{index} for index in range(cache_layers)]

    @property
    def shape(self) -> HiddenShape | None:
        """The shape of all hidden states; None where a forward cannot run a part of the layers."""
        if not self._in_order or len(self._seen) != len(self._layers) or len(set(self._seen)) > 1:
            return None
        return self._seen[0]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Watch for the length of the block."""
        with replaced(self._layers, [self._watching(layer.forward) for layer in self._layers]):
            yield

    def _watching(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            self._seen.append(HiddenShape.of(args[0] if args else None, output))
            return output

        return forward
