"""Dense attention: the whole context is one block, so that every token sees all before it (law 1)."""

from __future__ import annotations

from star_attention.config import StarConfig
from star_attention.plan import BlockPlan


class Dense:
    def plan(self, config: StarConfig, context_tokens: int) -> BlockPlan:
        return BlockPlan.dense(context_tokens)
