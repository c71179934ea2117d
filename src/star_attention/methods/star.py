"""Star Attention: blocks that see themselves and the anchor (arXiv 2411.17116)."""

from __future__ import annotations

from torch import Tensor

from star_attention import phase1
from star_attention.comm import Comm
from star_attention.config import StarConfig
from star_attention.hf.handle import ModelHandle
from star_attention.plan import BlockPlan, Segments
from star_attention.store import ContextKV, Keeping, Sight


class Star:
    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        return config.plan(context_tokens, ranks)

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        return plan.layout

    def keeping(self, config: StarConfig) -> Keeping:
        return Keeping(dtype=config.kv_dtype, device=config.kv_device)

    def sight(self, plan: BlockPlan) -> Sight | None:
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
            keeping=self.keeping(config),
            progress=progress,
        )
