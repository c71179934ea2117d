"""The decoder's layers through torch.compile, for our forwards only.

Each layer is compiled by itself, its attention staying ours: norms, rotary embeddings, activations and residual sums become
few kernels. For a single token, linear layers go through a kernel of ours, those with one input in one launch. Layers of one
kind share what is compiled, so that it happens once for a model and not once a layer.

A layer is compiled whole, with our attention as one operation in it, or where that is not possible in pieces around it, of which
each takes its time to compile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from star_attention.attention.kernels import triton_works
from star_attention.hf.execution import hook

_log = logging.getLogger("star_attention")

FULL, STEP = "full", "step"
"""What a forward is compiled for: many tokens, of a number that comes again and again (phase 1), or one token (phase 2)."""

# Whole layers are compiled with constants for everything but their weights and inputs: kinds of layers, lengths and models add
# up, but one that knows its own number in other ways than by its place would be compiled again and again.
_WHOLE = {"recompile_limit": 16}
# The pieces are handed their layer's number, which must be no constant then.
_PIECES = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 64}


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers: those of its lists whose members hold attention."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return [
        layer
        for one in lists
        for layer in one
        if any(hasattr(module, "layer_idx") for module in layer.modules())
    ]


class CompiledLayers:
    """Compiled forwards of a decoder's layers, in place while `active`, for threads that are inside our forwards.

    handle: the `ModelHandle` of the decoder.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._layers: list[Any] = layers_of(handle.decoder)
        self._linears: list[nn.Module] = []
        numbers: list[set[Any]] = [
            {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")}
            for layer in self._layers
        ]
        self._numbered = all(len(own) == 1 for own in numbers)
        self._gave_up = False
        self._options: dict[str, dict[str, Any]] = {FULL: {}, STEP: {}}
        if triton_works(handle.device):
            from star_attention.attention.kernels import triton_row

            self._row_linear = triton_row.RowLinear
            self._linears = [
                m for layer in self._layers for m in layer.modules() if triton_row.fits(m)
            ]
            self._options[STEP] = {"post_grad_custom_pre_pass": _TOGETHER}
        self._forwards = {
            what: [
                self._dispatch(layer, min(own), what)
                for layer, own in zip(self._layers, numbers, strict=True)
            ]
            for what in (FULL, STEP)
        }

    @property
    def whole(self) -> bool:
        """Whether layers are compiled together with their attention."""
        return self._numbered and not self._gave_up and bool(self._handle.seen.simple)

    @contextmanager
    def active(self, what: str) -> Iterator[None]:
        linears = self._linears if what == STEP else []
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

    def _dispatch(self, layer: Any, number: int, what: str) -> Callable[..., Any]:
        stock = layer.forward
        options = self._options[what]
        whole = torch.compile(stock, dynamic=False, fullgraph=True, options=options)
        # Dynamic, so that what is compiled for one layer's number serves all.
        pieces = torch.compile(stock, dynamic=True, options=options)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not hook.is_ours():
                return stock(*args, **kwargs)
            # (Before torch 2.13 settings are all threads'; another one may then compile more often than it needs to.)
            if self.whole:
                hook.enter(number)
                try:
                    with torch._dynamo.config.patch(_WHOLE):
                        return whole(*args, **kwargs)
                except (
                    torch._dynamo.exc.TorchDynamoException
                ) as error:  # nothing of the layer has run
                    _log.info("layers are compiled in pieces: %s", error)
                    self._gave_up = True
            hook.step_outside(self._handle.configs)
            if what == FULL:  # (rotary embeddings of an unknown length take ten times as long)
                for tensor in _tensors((args, kwargs)):
                    torch._dynamo.mark_static(tensor)
            with torch._dynamo.config.patch(_PIECES):
                return pieces(*args, **kwargs)

        return forward


class _Together(CustomGraphPass):
    """`triton_row.together`, named for torch's caches on disk by what it does."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        from star_attention.attention.kernels import triton_row

        triton_row.together(graph)

    def uuid(self) -> str:
        return "star_attention: linears together, 1"


_TOGETHER = _Together()
"""One for all: what is compiled for one layer serves another only if its passes are equal."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
