"""Dense attention: the whole context is one block, so that every token sees all before it (law 1).

One block lies on one rank; `ring` shares dense attention out.
"""

from __future__ import annotations

from star_attention.config import StarConfig
from star_attention.methods.star import Star
from star_attention.planning.plan import BlockPlan


class Dense(Star):
    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        return BlockPlan.dense(context_tokens, ranks)
