"""The decoder's layers through torch.compile, for our forwards only.

Each layer is compiled by itself around its attention, which stays ours: norms, rotary embeddings, activations and residual
sums become few kernels. For a single token, linear layers go through a kernel of ours. Layers of one kind share what is
compiled, so that it happens once for a model and not once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

FULL, STEP = "full", "step"
"""What a forward is compiled for: many tokens, of a number that comes again and again (phase 1), or one token (phase 2)."""

_SETTINGS = {
    "allow_unspec_int_on_nn_module": True,  # layers' numbers are no constants
    "recompile_limit": 64,  # kinds of layers, batch sizes and shapes add up; torch gives up at 8
}


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers: those of its lists whose members hold attention."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return [layer for one in lists for layer in one if any(hasattr(module, "layer_idx") for module in layer.modules())]


class CompiledLayers:
    """Compiled forwards of a decoder's layers, in place while `active`, for those threads for which `ours` is true."""

    def __init__(self, decoder: nn.Module, ours: Callable[[], bool]) -> None:
        self._layers: list[Any] = layers_of(decoder)
        self._forwards = {what: [_dispatch(layer, what, ours) for layer in self._layers] for what in (FULL, STEP)}
        self._linears: list[nn.Module] = []
        if find_spec("triton") is not None:
            from star_attention.attention.kernels import triton_row

            self._row_linear = triton_row.RowLinear
            self._linears = [m for layer in self._layers for m in layer.modules() if triton_row.fits(m)]

    @contextmanager
    def active(self, what: str) -> Iterator[None]:
        linears = self._linears if what == STEP else []
        # (Before torch 2.13 they are all threads'; another one may then compile more often than it needs to.)
        with torch._dynamo.config.patch(_SETTINGS):
            for layer, forward in zip(self._layers, self._forwards[what], strict=True):
                layer.forward = forward
            for linear in linears:
                linear.__class__ = self._row_linear
            try:
                yield
            finally:
                for layer in self._layers:
                    del layer.forward
                for linear in linears:
                    linear.__class__ = nn.Linear


def _dispatch(layer: Any, what: str, ours: Callable[[], bool]) -> Callable[..., Any]:
    stock = layer.forward
    # Dynamic, so that the layers' numbers are no constants either, and what is compiled for one serves all.
    fast = torch.compile(stock, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not ours():
            return stock(*args, **kwargs)
        if what == FULL:  # (rotary embeddings of an unknown length take ten times as long)
            for tensor in _tensors((args, kwargs)):
                torch._dynamo.mark_static(tensor)
        return fast(*args, **kwargs)

    return forward


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
