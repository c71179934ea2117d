"""The cache of phase 1 inside CUDA graphs: one forward with whole contexts from their first token.

Nothing before the forward is read, so that its layers attend to its own keys alone, and store them
where a table on the device says (`attention.kernels.triton_store`).

Axes: B contexts, G KV heads, S tokens of the forward, Q queries, H query heads, K keys, D head
size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.blocks import block_attention
from star_attention.attention.state import State
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import StarCache, StarLayer, build_layers
from star_attention.hf.cache.encode import SpanPosition
from star_attention.planning.plan import BlockPlan, Span
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, LayerKV


@dataclass(kw_only=True)
class WholePosition(SpanPosition):
    """The one span of the plan, and where its keys and values are stored."""

    table_LBC: Tensor
    lookbacks: list[int]
    like: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For each layer that stores, what keys and values of a token of all contexts are like: empty
    tensors `[B, G, 0, D]`."""


class WholeLayer(StarLayer[WholePosition]):
    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        from star_attention.attention.kernels import triton_store

        position = self.position
        position.like[self.index] = _without_tokens(k_BGSD), _without_tokens(v_BGSD)
        triton_store.store(k_BGSD, v_BGSD, table_LBC=position.table_LBC, layer=self.index)
        return k_BGSD, v_BGSD

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        position = self.position
        return block_attention(
            q_BQHD,
            (k_BKGD, v_BKGD),
            anchor=None,
            earlier=None,
            span=position.span,
            plan=position.plan,
            rule=rule,
            lookback=position.lookbacks[self.index],
        )


class WholeCache(StarCache):
    """A cache whose one forward stores whole contexts where a table says.

    Args:
        plan: blocks and anchor of the forward, whose contexts have the same length.
        windows: sliding window of each layer in tokens, None for full attention.
        table_LBC: where keys and values are stored; its layers' rows are filled for each context.
        comm: one process.
    """

    position: WholePosition

    def __init__(
        self, plan: BlockPlan, windows: list[int | None], table_LBC: Tensor, comm: Comm
    ) -> None:
        tokens = plan.context_tokens
        position = WholePosition(
            plan=plan,
            span=Span(start=0, stop=tokens, block_start=0),
            table_LBC=table_LBC,
            lookbacks=plan.lookbacks(len(windows)),
        )
        # They hold nothing but what a forward shows of the layers.
        nothing = ContextKV.empty(Segments(), [None] * len(windows))
        super().__init__(build_layers(WholeLayer, windows, position, [nothing]), position, comm)

    @property
    def merges_ranks(self) -> bool:
        return False

    def rows_for(self, stores: list[ContextKV]) -> list[list[list[int]]]:
        """Make room in stores for what a forward writes, and return the table that says where.

        Args:
            stores: the empty stores of the contexts, of which each layer keeps one run of tokens.
        """
        rows: list[list[list[int]]] = []
        for index, layer in enumerate(self.layers):
            like = self.position.like.get(index)
            own = [store.layers[index] for store in stores]
            for store in own:
                store.expands = layer.kv.expands
            rows.append([_row_for(store, like) for store in own])
        return rows


def _row_for(store: LayerKV, like: tuple[Tensor, Tensor] | None) -> list[int]:
    if like is None or not store.segments:
        return [0, 0, 0, 0]
    k_GLD, v_GLD = store.reserve(like[0][0], like[1][0])
    [(first, stop)] = store.segments
    return [k_GLD.data_ptr(), v_GLD.data_ptr(), first, stop - first]


def _without_tokens(x_BGSD: Any) -> Tensor:
    """Return an empty tensor that does not keep the memory of its origin."""
    return torch.empty_like(x_BGSD[:, :, :0])
