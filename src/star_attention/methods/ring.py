"""Ring attention: exact dense attention, its tokens dealt out to the ranks (Liu, Zaharia, Abbeel: arXiv 2310.01889).

The baseline that the paper compares with. Dealt out zig-zag, each rank has an early and a late run of tokens, so that causal
attention is the same work for all; "contiguous" is the layout that the paper used. On one rank it is `dense`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention import phase1
from star_attention.config import StarConfig
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.ring import RingCache
from star_attention.hf.execution.handle import ModelHandle
from star_attention.methods.dense import Dense
from star_attention.planning.plan import BlockPlan, ring_layout
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV
from star_attention.storage.oom import translate_oom


class Ring(Dense):
    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        return ring_layout(plan.context_tokens, plan.ranks, config.ring_layout)

    def encode(
        self,
        handle: ModelHandle,
        ids_BL: Tensor,
        plan: BlockPlan,
        comm: Comm,
        config: StarConfig,
        *,
        rope_length: int | None,
        progress: phase1.Progress | None,
    ) -> list[ContextKV]:
        layout = self.layout(config, plan)
        if (
            sum(bool(segments) for segments in layout) == 1
        ):  # one rank, or next to nothing to deal out
            return super().encode(
                handle, ids_BL, plan, comm, config, rope_length=rope_length, progress=progress
            )
        own = layout[comm.cp_rank]
        kv_format = self.kv_format(config)
        stores = [phase1.empty(handle, own, comm, kv_format) for _ in range(ids_BL.shape[0])]
        comm.tick(f"phase 1, ring over {plan.context_tokens:,} tokens")
        comm.progress(0, own.tokens)
        positions_S = torch.cat([torch.arange(start, stop) for start, stop in own])
        with translate_oom(
            lambda: (
                f"out of memory in phase 1: ring attention sends all {len(positions_S):,} tokens of a rank through in one"
                " forward; use more ranks, a shorter context, or method 'star'"
            )
        ):
            handle.encode(
                ids_BL[:, positions_S].to(handle.device),
                positions_S[None].to(handle.device),
                RingCache(layout, stores, handle.windows, comm),
                rope_length,
            )
        comm.progress(len(positions_S), len(positions_S))
        return stores
