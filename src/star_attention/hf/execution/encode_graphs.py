"""Encoding of short contexts as CUDA graphs: one launch for all layers.

A small model encodes a few thousand tokens faster than Python launches its operations. A graph is
captured when forwards of its kind come a second time, and serves all contexts up to its length:
tokens that pad a context come after it, where no token of it looks, and are not stored.

Not used: where phase 2 has no graphs (`graphs.can_capture`, `ModelHandle.graphs`), on several
ranks, for contexts of several forwards or that are stored in fp8 or in host memory, with hooks of
others, under autocast, and where the device takes longer than launches do (`waits_for_launches`).
The forward then runs as it does elsewhere.

Axes: B contexts, L layers, S tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.kernels import triton_store
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.whole import WholeCache
from star_attention.hf.execution import hook
from star_attention.hf.execution.capture import Recorder
from star_attention.hf.execution.last_layer import last_kv_layer
from star_attention.planning.plan import BlockPlan
from star_attention.planning.short import waits_for_launches
from star_attention.storage.kv import ContextKV
from star_attention.storage.transfers import overwrite, sent

MOST_TOKENS = 8192
"""Most tokens of a forward: graphs keep the memory that they work in."""
STEP = 512
"""Lengths of graphs are multiples of it, or whole blocks."""
MOST_GRAPHS = 16
"""Graphs of a model: the one that has not been used for longest makes room for another."""

Key = tuple[int, BlockPlan]
"""A kind of forward: contexts, and the plan of all its tokens."""


class _Graph:
    """One captured forward, and the tensors that it reads."""

    def __init__(self, contexts: int, plan: BlockPlan, handle: Any, comm: Comm) -> None:
        windows, device, tokens = handle.windows, handle.device, plan.context_tokens
        self.table_LBC = triton_store.new_table(len(windows), contexts, device)
        self.ids_BS = torch.zeros(contexts, tokens, dtype=torch.int64, device=device)
        self.positions_1S = torch.arange(tokens, device=device)[None]
        self.cache = WholeCache(plan, windows, self.table_LBC, comm)
        self.replay: Callable[[], None]


class EncodeGraphs:
    """The captured forwards of phase 1 of one model on one GPU.

    Args:
        handle: the `ModelHandle` of the model.
        recorder: captures the graphs.
    """

    def __init__(self, handle: Any, recorder: Recorder) -> None:
        self._handle, self._recorder = handle, recorder
        self._graphs: dict[Key, _Graph] = {}
        self._met: set[Key] = set()
        self._validity = recorder.validity()
        self._broken = False
        self.is_on = True
        """False to run forwards without graphs, for comparisons."""

    @property
    def captured(self) -> list[Key]:
        """The kinds of forwards that were captured, in the order of their last use."""
        return list(self._graphs)

    def run(
        self,
        ids_BS: Tensor,
        plan: BlockPlan,
        stores: list[ContextKV],
        comm: Comm,
        *,
        compiled_for: str | None,
    ) -> bool:
        """Encode whole contexts by a graph.

        Args:
            ids_BS: token ids on the CPU.
            plan: blocks and anchor of the contexts.
            stores: their stores, which are empty.
            comm: the ranks that share the work.
            compiled_for: mode of the compiled layers that the forward would run without a graph,
                None for layers as they are.

        Returns:
            False if there is no graph for them: nothing has happened then.
        """
        if not self._may_run(plan, stores, comm):
            return False
        with hook.lock_of(self._handle.model):
            if self._validity.has_ended():
                self._graphs.clear()
            graph = self._graph_for((len(ids_BS), self._padded(plan)), comm, compiled_for)
            if graph is None:
                return False
            rows = graph.cache.rows_for(stores)
            overwrite(graph.table_LBC, torch.tensor(rows, dtype=torch.int64, device="cpu"))
            device = self._handle.device
            graph.ids_BS[:, : plan.context_tokens].copy_(sent(ids_BS, device))
            graph.replay()
        return True

    def _may_run(self, plan: BlockPlan, stores: list[ContextKV], comm: Comm) -> bool:
        if not self.is_on or self._broken or comm.size > 1 or plan.ranks > 1:
            return False
        handle, device = self._handle, self._handle.device.type
        return (
            all(store.kv_format.as_computed for store in stores)
            and all(len(layer.segments) < 2 for layer in stores[0].layers)
            and len(stores) * plan.context_tokens <= MOST_TOKENS
            and waits_for_launches(
                self._parameters, len(handle.windows), len(stores) * plan.context_tokens
            )
            and not torch.is_autocast_enabled(device)
            and last_kv_layer(handle) is not None
        )

    @cached_property
    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._handle.decoder.parameters())

    def _padded(self, plan: BlockPlan) -> BlockPlan:
        """Return the plan of the forward that serves a context.

        Few lengths, so that few graphs serve all contexts. Blocks are as large as the context's.
        """
        tokens = -(-plan.context_tokens // STEP) * STEP
        if not plan.is_dense:
            # A short last block would take launches of its own.
            tokens = min(tokens, plan.num_blocks * plan.block_size)
        if self._handle.max_positions is not None:
            tokens = max(plan.context_tokens, min(tokens, self._handle.max_positions))
        if plan.is_dense:
            return BlockPlan.dense(tokens)
        return replace(plan, context_tokens=tokens)

    def _graph_for(self, key: Key, comm: Comm, mode: str | None) -> _Graph | None:
        if key not in self._met:
            self._met.add(key)
            return None
        # The last one is the latest.
        graph = self._graphs.pop(key, None) or self._capture(key, comm, mode)
        if graph is None:
            self._broken = True
            return None
        while len(self._graphs) >= MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = graph
        return graph

    @torch.inference_mode(False)
    def _capture(self, key: Key, comm: Comm, mode: str | None) -> _Graph | None:
        (contexts, plan), handle = key, self._handle
        graph = _Graph(contexts, plan, handle, comm)
        inputs = graph.ids_BS, graph.positions_1S, graph.cache, None
        replay = self._recorder.try_record(
            lambda mode: handle.encode(*inputs, compiled_for=mode, keys_only=True),
            mode=mode,
            after=lambda: None,
            comm=comm,
            subject=f"encoding {contexts} x {plan.context_tokens:,} tokens",
        )
        if replay is None:
            return None
        graph.replay = replay
        return graph
