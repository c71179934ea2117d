"""Star Attention: blocks that see themselves and the anchor (arXiv 2411.17116)."""

from __future__ import annotations

from star_attention.config import StarConfig
from star_attention.plan import BlockPlan


class Star:
    def plan(self, config: StarConfig, context_tokens: int) -> BlockPlan:
        return config.plan(context_tokens)
