"""Star Attention: blocks that see themselves and the anchor (arXiv 2411.17116)."""

from __future__ import annotations

from torch import Tensor

from star_attention import phase1
from star_attention.config import StarConfig
from star_attention.distributed.comm import Comm
from star_attention.hf.execution.handle import ModelHandle
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, KVFormat, VisibleRange


class Star:
    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        return config.plan(context_tokens, ranks)

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        return plan.layout

    def kv_format(self, config: StarConfig) -> KVFormat:
        return KVFormat(dtype=config.kv_dtype, device=config.kv_device)

    def visible(self, plan: BlockPlan) -> VisibleRange | None:
        return None

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
        return phase1.encode(
            handle,
            ids_BL,
            plan,
            comm,
            tokens_per_forward=config.forward_size(handle.device.type),
            rope_length=rope_length,
            anchor_source=config.anchor_source,
            kv_format=self.kv_format(config),
            progress=progress,
        )
