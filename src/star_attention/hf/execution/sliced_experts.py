"""Experts in slices: a rank multiplies the same rows of every expert's hidden layer.

All experts of a layer are two tensors: `gate_up_proj`, `[experts, 2 x width, hidden]`, and
`down_proj`, `[experts, hidden, width]`. Both halves of the first have rows of the slice, which are
two views; so the products are written out here, in the module's place.

Axes: T tokens, P pairs of a token and one of its experts, E experts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from star_attention.hf.execution import hook, sums


@torch.library.custom_op("star_attention::grouped", mutates_args=())
def _grouped(
    x_PK: Tensor, weight: Tensor, ends_E: Tensor, first: int, rows: int, column: int
) -> Tensor:
    """Multiply each expert's inputs by a part of its weight.

    Args:
        x_PK: inputs, in the order of their experts.
        weight: weights of all experts.
        ends_E: for each expert the number of pairs up to its last.
        first: first row of the part.
        rows: its number of rows.
        column: its first column.
    """
    part = weight[:, first : first + rows, column : column + x_PK.shape[1]]
    out: Tensor = functional.grouped_mm(x_PK, part.transpose(-2, -1), offs=ends_E)
    return out


@_grouped.register_fake
def _(x_PK: Tensor, weight: Tensor, ends_E: Tensor, first: int, rows: int, column: int) -> Tensor:
    return x_PK.new_empty(x_PK.shape[0], rows)


class _ExpertsSlice(nn.Module):
    """The experts of a layer, of which a slice is multiplied within our forward."""

    first: int
    stop: int
    gate_up_proj: Tensor
    down_proj: Tensor
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not hook.is_slicing():
            whole: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return whole
        experts, hidden, width = self.down_proj.shape
        first, rows = self.first, self.stop - self.first
        tokens, each = top_k_index.shape
        expert_P, order_P = top_k_index.flatten().sort(stable=True)
        pairs_E = functional.one_hot(expert_P, experts).sum(0)
        ends_E = pairs_E.cumsum(0).to(torch.int32)
        x_PK = hidden_states[order_P // each]
        halves = [
            _grouped(x_PK, self.gate_up_proj, ends_E, start + first, rows, 0)
            for start in (0, width)
        ]
        inner = self._apply_gate(torch.cat(halves, -1)).contiguous()
        out = _grouped(inner, self.down_proj, ends_E, 0, hidden, first)
        out = out * top_k_weights.flatten()[order_P][:, None]
        # Back in the order of tokens: a sum of a fixed order, the same on all ranks.
        out = out[order_P.argsort()].view(tokens, each, hidden).sum(1)
        return sums.sum_over(out.to(hidden_states.dtype), "cp")


def is_sliced(module: nn.Module) -> bool:
    return isinstance(module, _ExpertsSlice)


@functools.cache
def sliced_class(stock: type[nn.Module], first: int, stop: int) -> type[nn.Module]:
    """Return the class of a slice of a stock class's experts."""
    return type(_ExpertsSlice.__name__, (_ExpertsSlice, stock), dict(first=first, stop=stop))
