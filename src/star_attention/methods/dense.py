"""Dense attention: the context is one block, so every token sees all tokens before it (law 1).

One block lies on one rank; `ring` shards dense attention.
"""

from __future__ import annotations

from dataclasses import replace

from star_attention.config import StarConfig
from star_attention.methods.star import Star
from star_attention.planning.plan import BlockPlan


class Dense(Star):
    """Ordinary attention through the same engine, for comparison."""

    name = "dense"
    takes_sizes = False
    shares_anchor = False

    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        return BlockPlan.dense(context_tokens, ranks)

    def why_not_reuse(self) -> str | None:
        return (
            f"a {self.name} context cannot be reused for a changed one: every token depends on all"
            " tokens before it; encode the new text without it, or use method 'star'"
        )

    def why_no_second_look(self) -> str | None:
        return (
            f"every token of a {self.name} context has seen all tokens before it; leave it out, or"
            " use method 'star'"
        )

    def extended_plan(self, plan: BlockPlan, context_tokens: int) -> BlockPlan:
        """The context is one block, and stays one."""
        return replace(
            plan,
            context_tokens=context_tokens,
            block_size=max(plan.block_size, context_tokens),
        )

    def describe(self, plan: BlockPlan) -> str:
        return self.name
