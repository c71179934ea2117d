"""The decoder's layers through torch.compile, for our forwards only.

Each layer is compiled by itself: norms, rotary embeddings, activations and residual sums become few
kernels. For a single token, or one of each of a few rows, linear layers go through kernels of ours,
those with the same input in one launch, and a single token's experts through another. Gates and
residual sums are part of the launches next to them (`linear.folding`), norms are kernels of ours
(`linear.norm_folding`), and so is the choice of a single token's experts (`linear.routing`). Rotary
embeddings are computed where new keys are stored (`rotary`).
Layers of one kind share compiled code, so each kind is compiled once.

A layer is compiled whole, with our attention as one custom operation in it (`hook`). Where that is
not possible it is compiled in pieces around the attention, each of which takes its time to compile:
in models whose layers do not simply read their own keys (KV sharing; MLA, where a forward expands
the context), and for layers that torch.compile cannot trace without a break.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from star_attention.attention.kernels import triton_works
from star_attention.hf.cache.base import StarCache
from star_attention.hf.execution import hook, sums
from star_attention.hf.execution.complex_products import multiply_reals
from star_attention.hf.execution.layer_part import layers_of
from star_attention.linear.fp8 import Fp8Linear, share_quantizing

_log = logging.getLogger("star_attention")

FULL, STEP, ROWS, QUERY = "full", "step", "rows", "query"
"""Modes of compiled layers: forwards of many tokens, all of one length (phase 1), of one token
(phase 2), of one token of each of any number of rows, or of any number of one row's (a query)."""
_VARYING = {ROWS: 0, QUERY: 1}
"""The axis of activations whose length varies from forward to forward: one code serves all."""

_ENDS = ("norm", "final_layernorm", "rotary_emb")
"""Names that transformers gives the modules of a decoder before and after its layers."""

# The option of torch.compile for passes of ours.
_PASSES = "post_grad_custom_pre_pass"
# Whole layers are compiled with constants for everything but weights and inputs. Kinds of layers
# (the ends of a model in fp8 are one), lengths and models add up, and a layer that knows its index
# in other ways than by `layer_idx` would be compiled again and again without a limit.
_WHOLE = {"recompile_limit": 24}
# Pieces read their layer's index, which must not be a constant then.
_PIECES = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 64}

# A module, its own class, and that of our kernel.
_Change = tuple[nn.Module, type[nn.Module], type[nn.Module]]


class CompiledLayers:
    """Compiled forwards of a decoder's layers, installed while `active`.

    Threads outside of our forwards keep the stock forwards meanwhile.

    Args:
        handle: the `ModelHandle` of the decoder.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._layers: list[Any] = layers_of(handle.decoder)
        self._linears: list[nn.Module] = []
        self._experts: list[_Change] = []
        cache_indices: list[set[Any]] = [
            {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
            for layer in self._layers
        ]
        self._one_cache_layer_each = all(len(indices) == 1 for indices in cache_indices)
        self._gave_up = False
        # Calls after which their like compile nothing more.
        self._known: set[tuple[Any, ...]] = set()
        # The final norm and the rotary embeddings: between the layers of two steps.
        self._ends = [
            module
            for name, module in handle.decoder.named_children()
            if name in _ENDS and not any(True for _ in module.children())
        ]
        self._options: dict[str, dict[str, Any]] = {
            mode: {_PASSES: _PLAIN} for mode in (FULL, STEP, ROWS, QUERY)
        }
        if any(isinstance(each, Fp8Linear) for layer in self._layers for each in layer.modules()):
            for mode in (FULL, QUERY):
                self._options[mode][_PASSES] = _SHARE_QUANTIZING
        if triton_works(handle.device):
            from star_attention.attention.kernels import triton_pdl
            from star_attention.hf.execution import latent_token, row_experts  # noqa: F401

            # Code from torch's caches on disk calls the operations that passes put into it, but the
            # passes do not run.
            from star_attention.linear import (  # noqa: F401
                triton_few_folded,
                triton_folded,
                triton_norm,
                triton_router,
                triton_row,
            )

            self._row_linear = triton_row.RowLinear
            self._linears = [
                module
                for layer in self._layers
                for module in layer.modules()
                if triton_row.is_plain_linear(module)
            ]
            self._experts = row_experts.find(self._layers)
            # Rotary embeddings of query and key are kernels that do not wait for each other.
            self._options[STEP] = {_PASSES: _FOLD, "combo_kernels": True}
            self._options[ROWS][_PASSES] = _FOLD_ROWS
            if triton_pdl.is_supported(handle.device):
                # Torch's kernels take part, or ours would have to wait for their ends.
                for mode in (STEP, ROWS):
                    self._options[mode]["triton.enable_pdl"] = True
        self._forwards_of_ends = {
            mode: [
                _compiled_end(module, _VARYING.get(mode), self._options[mode])
                for module in self._ends
            ]
            for mode in (STEP, ROWS)
        }
        self._forwards = {
            mode: [
                self._dispatch(layer, min(indices), mode)
                for layer, indices in zip(self._layers, cache_indices, strict=True)
            ]
            for mode in (FULL, STEP, ROWS, QUERY)
        }

    @property
    def whole(self) -> bool:
        """True if layers of all forwards are compiled together with their attention."""
        reads_own_keys: bool = self._handle.probe_result.reads_own_keys
        return self._may_be_whole and reads_own_keys

    def way(self, cache: StarCache) -> str:
        """Return how layers of a forward through `cache` attend (`hook`).

        Within compiled layers where these read their own keys, or what they expand to keys (MLA).
        """
        if self.whole:
            return hook.WITHIN
        compressed = self._may_be_whole and cache.attends_compressed
        return hook.COMPRESSED if compressed else hook.OVER

    @property
    def _may_be_whole(self) -> bool:
        return self._one_cache_layer_each and not self._gave_up

    @contextmanager
    def active(self, mode: str) -> Iterator[None]:
        """Install the layers compiled for `mode` for the length of the block."""
        # Linear layers and experts that are sliced have classes of their own (`slices`).
        known: list[_Change] = list(self._experts) if mode == STEP else []
        if mode in (STEP, ROWS):
            known += [(linear, nn.Linear, self._row_linear) for linear in self._linears]
        changed = [each for each in known if type(each[0]) is each[1]]
        for layer, forward in zip(self._layers, self._forwards[mode], strict=True):
            layer.forward = forward
        ends = list(zip(self._ends, self._forwards_of_ends.get(mode, ()), strict=False))
        for end, forward in ends:
            end.forward = forward
        for module, _, of_rows in changed:
            module.__class__ = of_rows
        try:
            yield
        finally:
            for module in (*self._layers, *(end for end, _ in ends)):
                del module.forward
            for module, stock, _ in changed:
                module.__class__ = stock

    def _is_within(self) -> bool:
        """True if the forward that runs has its attention within compiled layers."""
        return any(map(hook.is_within, self._handle.configs))

    def _compiling(self, *call: Any) -> AbstractContextManager[None]:
        """Return the block for a call: at its first time it may compile, which takes long."""
        if call in self._known:
            return nullcontext()
        self._known.add(call)
        return hook.comm_of_forward().working("compiling")

    def _dispatch(self, layer: Any, cache_index: int, mode: str) -> Callable[..., Any]:
        """Make a layer's forward: compiled whole, in pieces or, outside of ours, the stock one."""
        stock = layer.forward
        options = self._options[mode]
        axis = _VARYING.get(mode)
        dynamic = False if axis is None else None
        whole = torch.compile(stock, dynamic=dynamic, fullgraph=True, options=options)
        # Dynamic, so that code compiled with one layer's index serves all layers.
        pieces = torch.compile(stock, dynamic=True, options=options)

        def run(args: Any, kwargs: Any) -> Any:
            # Before torch 2.13 these settings are shared by all threads: another one may then
            # compile more often than it needs to.
            _mark_varying(axis, args, kwargs)
            if self._is_within():
                hook.enter_layer(cache_index)
                try:
                    with torch._dynamo.config.patch(_WHOLE):
                        return whole(*args, **kwargs)
                except torch._dynamo.exc.TorchDynamoException as error:
                    if mode == QUERY:
                        # Other modes may do, and the query's layers run as they are.
                        raise
                    # Nothing of the layer has run.
                    _log.info("layers are compiled in pieces: %s", error)
                    self._gave_up = True
            hook.step_outside(self._handle.configs)
            if mode == FULL:
                # Rotary embeddings of an unknown length take ten times as long.
                for tensor in _tensors((args, kwargs)):
                    torch._dynamo.mark_static(tensor)
            with torch._dynamo.config.patch(_PIECES):
                return pieces(*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not hook.in_our_forward():
                return stock(*args, **kwargs)
            hidden = next(_tensors((args, kwargs)))
            with self._compiling(mode, cache_index, hidden.shape, self._is_within()):
                return run(args, kwargs)

        return forward


def _compiled_end(module: Any, axis: int | None, options: dict[str, Any]) -> Callable[..., Any]:
    """Make a forward of new tokens: compiled or, outside of ours and where it fails, the stock one.

    Torch's own kernels would take as long as a layer's products, a launch for each operation.
    """
    stock = module.forward
    dynamic = False if axis is None else None
    compiled = torch.compile(stock, dynamic=dynamic, fullgraph=True, options=options)
    failed: bool | None = None

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if hook.in_our_forward() and not failed:
            compiling: AbstractContextManager[None] = nullcontext()
            if failed is None:
                # Torch compiles nothing for complex numbers (rotary embeddings of some families).
                found = stock(*args, **kwargs)
                failed = any(map(torch.is_complex, _tensors(found)))
                if failed:
                    return found
                compiling = hook.comm_of_forward().working("compiling")
            _mark_varying(axis, args, kwargs)
            try:
                with compiling, torch._dynamo.config.patch(_WHOLE):
                    return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                _log.info("%s is not compiled: %s", type(module).__name__, error)
                failed = True
        return stock(*args, **kwargs)

    return forward


def _mark_varying(axis: int | None, *call: Any) -> None:
    """Let a call's code serve other lengths of an axis, too; the first tensor has it."""
    if axis is None:
        return
    length = next(_tensors(call)).shape[axis]
    for tensor in _tensors(call):
        if tensor.dim() > axis and tensor.shape[axis] == length:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)


class _Passes(CustomGraphPass):
    """Passes over the graph of a layer, with a name for torch's caches on disk."""

    def __init__(self, name: str, *passes: Callable[[torch.fx.Graph], None]) -> None:
        self._name, self._passes = name, passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> str:
        return f"star_attention: {self._name}"


def _fuse_linears(graph: torch.fx.Graph) -> None:
    from star_attention.linear import triton_row

    triton_row.fuse_linears(graph)


def _fold(graph: torch.fx.Graph) -> None:
    from star_attention.linear import folding

    folding.fold(graph)


def _route(graph: torch.fx.Graph) -> None:
    from star_attention.linear import routing

    routing.route(graph)


def _mix(graph: torch.fx.Graph) -> None:
    from star_attention.linear import shared_experts

    shared_experts.mix(graph)


def _rotate(graph: torch.fx.Graph) -> None:
    from star_attention.hf.execution import rotary

    rotary.leave_to_kernels(graph)


def _finish_latents(graph: torch.fx.Graph) -> None:
    from star_attention.hf.execution import latent_token

    latent_token.leave_to_kernels(graph)


def _fold_norms(graph: torch.fx.Graph) -> None:
    from star_attention.linear import norm_folding

    norm_folding.fold(graph, sums.OPERATIONS)


def _fold_norms_of_rows(graph: torch.fx.Graph) -> None:
    from star_attention.linear import norm_folding

    # Sums over ranks are kernels of their own: what follows is in them for a single row only.
    norm_folding.fold(graph)
    norm_folding.join_products(graph)


_PLAIN = _Passes("reals 2", multiply_reals)
_FOLD_ROWS = _Passes(
    "reals 2, rotary 2, fuse linears 3, fold 4, norms of rows 1",
    *(multiply_reals, _rotate, _fuse_linears, _fold, _fold_norms_of_rows),
)
_FOLD = _Passes(
    "reals 2, rotary 2, latents 1, fuse linears 3, fold 3, route 3, mix 3, norms 2",
    *(multiply_reals, _rotate, _finish_latents, _fuse_linears, _fold, _route, _mix, _fold_norms),
)
_SHARE_QUANTIZING = _Passes("reals 2, share quantizing 1", multiply_reals, share_quantizing)
"""One instance for all: compiled code serves another layer only if their passes are equal."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
