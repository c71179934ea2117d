"""Weights in slices: in phase 2 each cp rank multiplies a part of every linear layer.

All ranks hold all weights, which phase 1 needs. An answer's new tokens pass through every rank's
model, so each can take a slice of the work instead: heads of the projections to query, key and
value and of the output projection, hidden rows of MLPs and experts, rows of the vocabulary. Slices
are views of the weights; nothing is copied. Attention stays sharded by context: `AnswerLayer`
gathers the heads' queries, keys and values, and merges its own heads over all shards.

For the length of our forward the classes of the layers are swapped. The swapped classes multiply a
slice only within our forward; other threads and plain forwards keep the whole layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from star_attention.attention.kernels import triton_works
from star_attention.distributed.comm import Comm
from star_attention.errors import InvalidInputError
from star_attention.hf.execution import hook, sliced_experts, sums
from star_attention.hf.loading import slice_groups
from star_attention.hf.loading.slice_groups import ATTENTION, EXPERTS, HEAD, Group, Groups
from star_attention.linear import fp8, is_one_token
from star_attention.linear.fp8 import Fp8Linear

SAVED_BYTES = 32 * 2**20
"""Bytes of weights that a collective must save a rank, to be worth its time.

At 4 TB/s that is 8 us, what a collective of few tokens takes with the launches around it."""

SAVED_BYTES_ON_CPU = 2 * 2**20
"""The same for a CPU: there that takes 50 to 150 us, and a sum with Python's time some 40."""

_COLLECTIVES = {ATTENTION: 3}
"""Collectives that slices of a group add, if not one. Packing and unpacking heads takes as long as
a third."""


class _OutputSlice(nn.Linear):
    """A linear layer that computes a slice of its outputs within our forward."""

    first: int
    stop: int
    row_linear: Callable[..., Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        if not hook.is_slicing():
            return super().forward(input)
        if self.row_linear is not None and _is_compiled_row(input):
            rows, scale = (self.first, self.stop), _scale(self)
            return self.row_linear(input, self.weight, self.bias, rows=rows, scale=scale)
        own = slice(self.first, self.stop)
        bias = None if self.bias is None else self.bias[own]
        return _product(self, input, self.weight[own], bias, rows=own)


class _InputSlice(nn.Linear):
    """A linear layer that multiplies a slice of its inputs, and sums over the ranks."""

    first: int
    stop: int
    adds_bias: bool
    row_linear: Callable[..., Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        if not hook.is_slicing():
            return super().forward(input)
        # The bias is added once, although the results of all ranks are summed.
        bias = self.bias if self.adds_bias else None
        if self.row_linear is not None and _is_compiled_row(input):
            part = self.row_linear(
                input, self.weight, bias, first_column=self.first, scale=_scale(self)
            )
        else:
            part = _product(self, input, self.weight[:, self.first : self.stop], bias)
        return sums.sum_over(part, "cp")


class _HeadSlice(nn.Linear):
    """A language-model head that computes the logits of a slice of the vocabulary."""

    first: int
    stop: int
    most: int

    def forward(self, input: Tensor) -> Tensor:
        if not hook.is_slicing():
            return super().forward(input)
        bias = None if self.bias is None else self.bias[self.first : self.stop]
        part = functional.linear(input, self.weight[self.first : self.stop], bias)
        missing = self.most - part.shape[-1]
        if missing:
            part = functional.pad(part, (0, missing))
        parts = hook.comm_of_forward().cp_gather(part)
        logits = parts.movedim(0, -2).flatten(-2)
        return logits[..., : self.out_features]


def _product(
    layer: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice = slice(None)
) -> Tensor:
    """Multiply a part of a layer's weight, of which `rows` are the rows."""
    if isinstance(layer, Fp8Linear):
        return fp8.linear(x, weight, layer.scale[rows], bias, kernels=layer.has_kernels)
    return functional.linear(x, weight, bias)


def _scale(layer: nn.Linear) -> Tensor | None:
    return layer.scale if isinstance(layer, Fp8Linear) else None


def _is_compiled_row(input: Tensor) -> bool:
    return torch.compiler.is_dynamo_compiling() and is_one_token(input)


@functools.cache
def _sliced_class(
    base: type[nn.Linear], stock: type[nn.Linear], use_kernel: bool = False, **attributes: Any
) -> type[nn.Linear]:
    """Return the class of slices of one size, the same for all layers: they share compiled code.

    Offsets and sizes are the class's, since a layer's own attributes would stay in the model.
    `stock` is the layers' own class.
    """
    attributes["row_linear"] = None
    if use_kernel:
        from star_attention.linear import triton_row

        attributes["row_linear"] = staticmethod(triton_row.linear)
    return type(base.__name__, (base, stock), attributes)


class Slices:
    """The layers of a model that a rank multiplies in slices.

    Args:
        found: the layers that fit together.
        parts: the parts in slices, of `slice_groups.PARTS`.
        ranks: number of ranks, and which of them this is.
        use_kernel: True to multiply single rows by our kernel, in compiled layers.

    Attributes:
        parts: the parts in slices.
        by_heads: True if attention is, so that new queries, keys and values are gathered.
        has_head: True if the language-model head is, so that all ranks compute logits.
    """

    def __init__(
        self, found: Groups, parts: tuple[str, ...], ranks: tuple[int, int], *, use_kernel: bool
    ) -> None:
        missing = set(parts) - set(found.parts)
        assert not missing, f"rank 0 slices {missing}, which is not possible here: {found.reasons}"
        self.parts = parts
        self.by_heads, self.has_head = ATTENTION in parts, HEAD in parts
        self._use_kernel = use_kernel
        self._classes = [
            pair
            for group in found.groups
            if group.part in parts
            for pair in self._classes_of(group, *ranks)
        ]

    def _classes_of(self, group: Group, ranks: int, rank: int) -> Iterator[tuple[Any, type[Any]]]:
        """Yield each layer of a group with the class of this rank's slice."""
        if group.part == EXPERTS:
            (experts,) = group.layers
            bounds = slice_groups.own_range(experts.down_proj.shape[2], ranks, rank)
            stock: Any = type(experts)
            yield experts, sliced_experts.sliced_class(stock, *bounds)
            return
        if group.part == HEAD:
            (head,) = group.layers
            first, stop, most = slice_groups.padded_range(head.out_features, ranks, rank)
            yield head, _sliced_class(_HeadSlice, nn.Linear, first=first, stop=stop, most=most)
            return
        for layer in group.layers:
            is_last = layer is group.layers[-1]
            size = layer.in_features if is_last else layer.out_features
            if group.part == ATTENTION:
                first, stop = size // ranks * rank, size // ranks * (rank + 1)
            else:
                first, stop = slice_groups.own_range(size, ranks, rank)
            stock = type(layer)
            use_kernel = self._use_kernel and getattr(layer, "has_kernels", True)
            attributes: dict[str, Any] = dict(first=first, stop=stop, use_kernel=use_kernel)
            if is_last:
                yield layer, _sliced_class(_InputSlice, stock, adds_bias=rank == 0, **attributes)
            else:
                yield layer, _sliced_class(_OutputSlice, stock, **attributes)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Swap the layers' classes for the length of the block, under the model's lock."""
        stock = [type(layer) for layer, _ in self._classes]
        try:
            for layer, kind in self._classes:
                layer.__class__ = kind
            yield
        finally:
            for (layer, _), kind in zip(self._classes, stock, strict=True):
                layer.__class__ = kind


@dataclass
class _Kept:
    """What is known of a model's slices from call to call."""

    ranks: tuple[int, int]
    found: Groups
    slices: dict[tuple[str, ...], Slices] = field(default_factory=dict)
    worthwhile: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Parts, by the bytes that a collective must save."""


def look(handle: Any, comm: Comm) -> None:
    """Forget what is known of slices of a model that has changed since."""
    if handle.kept_slices is not None:
        _kept(handle, comm)


def _kept(handle: Any, comm: Comm, *, looked: bool = False) -> _Kept:
    """Return what is known of a model's slices, found anew if it is not true any more.

    Args:
        handle: the `ModelHandle` of the model.
        comm: the ranks.
        looked: the model is known not to have changed since.
    """
    looked = looked or handle.is_frozen
    ranks = comm.cp_size, comm.cp_rank
    # The forwards of other threads swap the classes of layers meanwhile.
    with hook.lock_of(handle.model):
        kept: _Kept | None = handle.kept_slices
        if kept is None or kept.ranks != ranks or not (looked or kept.found.is_current):
            kept = _Kept(ranks, slice_groups.find(handle, comm.cp_size))
            handle.kept_slices = kept
        return kept


def of(handle: Any, parts: tuple[str, ...], comm: Comm, *, looked: bool = False) -> Slices | None:
    """Return a rank's slices of some parts of a `ModelHandle`'s model; None for no parts.

    `looked` says that the call has made a `look` already.
    """
    if not parts:
        return None
    kept = _kept(handle, comm, looked=looked)
    if parts not in kept.slices:
        use_kernel = triton_works(handle.device)
        kept.slices[parts] = Slices(kept.found, parts, kept.ranks, use_kernel=use_kernel)
    return kept.slices[parts]


def choose(
    handle: Any, comm: Comm, wanted: bool | None, *, looked: bool = False
) -> tuple[str, ...]:
    """Return the parts of a model to multiply in slices.

    Args:
        handle: the `ModelHandle`.
        comm: the ranks.
        wanted: `StarConfig.slice_weights`.
        looked: the call has made a `look` already.

    Raises:
        InvalidInputError: slices are asked for, and there are none.
    """
    if wanted is False or comm.cp_size == 1:
        return ()
    if comm.tp_size > 1:
        if wanted:
            raise InvalidInputError(
                f"slice_weights=True does not work with tensor_parallel {comm.tp_size}, which"
                " shards the weights already; leave one of them out"
            )
        return ()
    if wanted is None and not _is_fast(handle, comm):
        return ()
    kept = _kept(handle, comm, looked=looked)
    found = kept.found
    if wanted is None:
        least = SAVED_BYTES_ON_CPU if handle.device.type == "cpu" else SAVED_BYTES
        if least not in kept.worthwhile:
            kept.worthwhile[least] = _worthwhile(found, comm.cp_size, least)
        return kept.worthwhile[least]
    if not found.parts:
        reasons = "; ".join(f"{part}: {reason}" for part, reason in found.reasons.items())
        raise InvalidInputError(
            f"slice_weights=True finds nothing in {type(handle.model).__name__} to slice over"
            f" {comm.cp_size} ranks ({reasons}); leave it out"
        )
    return found.parts


def saved_bytes(handle: Any, comm: Comm, parts: tuple[str, ...]) -> int:
    """Return the bytes of weights in these parts that a rank does not multiply."""
    groups = [group for group in _kept(handle, comm).found.groups if group.part in parts]
    return sum(group.nbytes for group in groups) * (comm.cp_size - 1) // comm.cp_size


def _is_fast(handle: Any, comm: Comm) -> bool:
    """True if collectives are quick beside the layers: on one host, and on GPUs without Python."""
    without_python = handle.device.type == "cuda" and handle.graphs is not None
    return comm.one_host and (handle.device.type == "cpu" or without_python)


def _worthwhile(found: Groups, ranks: int, saved_bytes: int) -> tuple[str, ...]:
    """Return the parts whose slices save so many bytes for each collective.

    Experts are not among them: a token reads few of them, and it has not been measured.
    """
    parts = []
    for part in found.parts:
        if part == EXPERTS:
            continue
        groups = [group for group in found.groups if group.part == part]
        saved = sum(group.nbytes for group in groups) * (ranks - 1) // ranks
        if saved >= saved_bytes * _COLLECTIVES.get(part, 1) * len(groups):
            parts.append(part)
    return tuple(parts)
