"""Star Attention: blocks that see themselves and the anchor (arXiv 2411.17116)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from star_attention.config import StarConfig
from star_attention.planning.lookback import described
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.sizes import counted, format_size
from star_attention.planning.windows import Windows, kept_by_layer

# Imports torch, which a command line does not need to be checked.
if TYPE_CHECKING:
    from star_attention.phase1 import EncodeJob, Steps
    from star_attention.storage.kv import ContextKV, VisibleRange


class Star:
    """The paper's method, and the base of the others: each overrides what differs."""

    name = "star"
    takes_sizes = True
    size_names = ("b", "a")
    shares_anchor = True

    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        return config.plan(context_tokens, ranks)

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        return plan.layout

    def visible_range(self, plan: BlockPlan) -> VisibleRange | None:
        return None

    def kept(
        self, plan: BlockPlan, segments: Segments, windows: Windows, kv_windows: str
    ) -> list[Segments]:
        return kept_by_layer(segments, windows, plan.context_tokens, kv_windows)

    def encode(self, job: EncodeJob) -> Steps[list[ContextKV]]:
        from star_attention import phase1
        from star_attention.methods.helping import helping_of

        return phase1.encode(job, helping_of(job))

    def why_not_extend(self, ranks: int) -> str | None:
        return None

    def why_not_reuse(self) -> str | None:
        return None

    def why_no_second_look(self) -> str | None:
        return None

    def extended_plan(self, plan: BlockPlan, context_tokens: int) -> BlockPlan:
        return replace(plan, context_tokens=context_tokens)

    def describe(self, plan: BlockPlan) -> str:
        if plan.is_dense:
            return f"1 block of {format_size(plan.context_tokens)}, which is dense attention"
        blocks = f"{counted(plan.num_blocks, 'block')} x {format_size(plan.block_size)}"
        sizes = f"{blocks}, anchor {format_size(plan.anchor_size)}"
        if not plan.lookback:
            return sizes
        return f"{sizes}, look-back {described(plan.lookback, plan.lookback_layers)}"
