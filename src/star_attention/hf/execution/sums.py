"""Sums over ranks: a call in plain forwards, one operation in compiled layers.

torch.compile cannot trace a communicator. The operation finds it by itself: that of the forward
which this thread runs, or that of a sharded model.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from star_attention.distributed.comm import Comm
from star_attention.hf.execution import hook

Ranks = Literal["cp", "tp"]

# Communicators of sharded models, by a number that compiled code holds as a constant. Numbers count
# from 0 in each process, so that code compiled by an earlier one can be used again.
_comms: weakref.WeakValueDictionary[int, Comm] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_NO_SHARD = -1


def sum_over(part: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of a tensor over ranks, in its precision; only within our forwards.

    Args:
        part: this rank's summand.
        ranks: "cp" for the context-parallel ranks of the forward, "tp" for the tensor-parallel
            ones.
    """
    if torch.compiler.is_compiling():
        total: Tensor = _sum_op(part, ranks, _NO_SHARD)
        return total
    return _summed(hook.comm_of_forward(), part, ranks)


def summing(comm: Comm) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a forward hook that sums a layer's result over the tp ranks of `comm`.

    It also does so where the model runs outside of our forwards.
    """
    # One number for all layers, which share their compiled code.
    number = next((number for number, other in _comms.items() if other is comm), None)
    if number is None:
        number = next(_numbers)
        _comms[number] = comm

    def sum_result(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            total: Tensor = _sum_op(output, "tp", number)
            return total
        return comm.tp_sum(output)

    return sum_result


@torch.library.custom_op("star_attention::sum", mutates_args=())
def _sum_op(part: Tensor, ranks: str, shard: int) -> Tensor:
    return _summed(_comm_of(shard), part, ranks)


@_sum_op.register_fake
def _(part: Tensor, ranks: str, shard: int) -> Tensor:
    return torch.empty_like(part, memory_format=torch.contiguous_format)


@torch.library.custom_op("star_attention::sum_norms", mutates_args=())
def _sum_norms_op(
    part: Tensor,
    ranks: str,
    shard: int,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    """The sum of a single row and what follows: see `linear.triton_norm.RowNorms`."""
    from star_attention.linear.triton_norm import RowNorms

    norms = RowNorms(post, times, residual, pre, offsets, eps)
    return _comm_of(shard).sum_row(part, ranks, norms)


@_sum_norms_op.register_fake
def _(
    part: Tensor,
    ranks: str,
    shard: int,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    from star_attention.linear.triton_norm import RowNorms

    return RowNorms(post, times, residual, pre, offsets, eps).outs(part)


@torch.library.custom_op("star_attention::sum_product_norms", mutates_args=())
def _sum_product_norms_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    part: Sequence[int],
    scale: Tensor | None,
    ranks: str,
    shard: int,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    """The same with the product before it: arguments are those of `triton_row.linears`."""
    from star_attention.linear import triton_row
    from star_attention.linear.triton_norm import RowNorms

    out = x.new_empty(*x.shape[:-1], part[1])
    (product,) = triton_row.made_products(x.shape[-1], [weight], [bias], part, [scale], [out])
    norms = RowNorms(post, times, residual, pre, offsets, eps)
    return _comm_of(shard).sum_product(x, product, ranks, norms)


@_sum_product_norms_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    part: Sequence[int],
    scale: Tensor | None,
    ranks: str,
    shard: int,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    from star_attention.linear.triton_norm import RowNorms

    out = x.new_empty(*x.shape[:-1], part[1])
    return RowNorms(post, times, residual, pre, offsets, eps).outs(out)


OPERATIONS = (
    torch.ops.star_attention.sum.default,
    torch.ops.star_attention.sum_norms.default,
    torch.ops.star_attention.sum_product_norms.default,
)
"""The sum, that of a single row with what follows, and with the product before it
(`linear.norm_folding`)."""


def _comm_of(shard: int) -> Comm:
    return _comms[shard] if shard != _NO_SHARD else hook.comm_of_forward()


def _summed(comm: Comm, part: Tensor, ranks: str) -> Tensor:
    """Return a sum in memory of its own; `part` keeps its value."""
    total = comm.tp_sum(part, in_place=False) if ranks == "tp" else comm.cp_sum(part)
    if total.data_ptr() == part.data_ptr():
        total = total.clone(memory_format=torch.contiguous_format)
    return total
