"""StreamingLLM: tokens see a few first tokens (sinks) and a window (Xiao et al.: arXiv 2309.17453).

One of the paper's baselines. `anchor_size` is the number of sinks (4 by default), `block_size` the
window. Everything else is forgotten, so memory does not grow with the context, and neither does
what a query can find. Tokens keep their positions in the text; the StreamingLLM paper counts
positions within the cache, for texts longer than those that the model was trained on.
"""

from __future__ import annotations

from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError
from star_attention.hf.cache.window import WindowCache
from star_attention.methods.star import Star
from star_attention.phase1 import EncodeJob, Forwards, Steps
from star_attention.planning.plan import BlockPlan, Span
from star_attention.planning.segments import Segments
from star_attention.planning.sizes import counted, format_size, resolve_sizes
from star_attention.planning.windows import Windows
from star_attention.storage.kv import ContextKV, VisibleRange

SINKS = 4
"""Enough sinks, by table 2 of the StreamingLLM paper."""


class StreamingLLM(Star):
    """Sinks and a sliding window, on one rank."""

    name = "streaming_llm"
    size_names = ("window", "sinks")
    shares_anchor = False

    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        if ranks > 1:
            raise InvalidInputError(
                f"method 'streaming_llm' runs on one rank, got {ranks}: each token waits for those"
                " before it; use 'star'"
            )
        window, _ = resolve_sizes(context_tokens, config.block_size, None)
        sinks = min(SINKS, window) if config.anchor_size is None else config.anchor_size
        return BlockPlan.resolve(context_tokens, window, sinks, ranks)

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        sinks = min(plan.anchor_size, plan.context_tokens)
        recent = max(sinks, plan.context_tokens - plan.block_size)
        runs = ((0, sinks), (recent, plan.context_tokens))
        return (Segments((start, stop) for start, stop in runs if start < stop),)

    def visible_range(self, plan: BlockPlan) -> VisibleRange | None:
        return VisibleRange(first=plan.anchor_size, recent=plan.block_size)

    def kept(
        self, plan: BlockPlan, segments: Segments, windows: Windows, kv_windows: str
    ) -> list[Segments]:
        # The window of the method is short enough.
        return [segments] * len(windows)

    def why_not_extend(self, ranks: int) -> str | None:
        return (
            "a streaming_llm context cannot be extended: it holds its first and last tokens only;"
            " encode the joined text again"
        )

    def why_not_reuse(self) -> str | None:
        return (
            f"a {self.name} context cannot be reused for a changed one: it holds its first and last"
            " tokens only; encode the new text without it, or use method 'star'"
        )

    def why_no_second_look(self) -> str | None:
        return (
            f"a {self.name} context holds its first and last tokens only; leave it out, or use"
            " method 'star'"
        )

    def describe(self, plan: BlockPlan) -> str:
        sinks = counted(plan.anchor_size, "sink")
        return f"{sinks}, window {format_size(plan.block_size)}"

    def encode(self, job: EncodeJob) -> Steps[list[ContextKV]]:
        plan, windows = job.plan, job.handle.windows
        stores = [
            ContextKV.empty(
                job.segments,
                [None] * len(windows),
                job.kv_format,
                visible=self.visible_range(plan),
            )
            for _ in range(job.contexts)
        ]
        cache = WindowCache(plan, stores, windows, job.comm)
        spans = [
            Span(
                start=start,
                stop=min(start + job.span_tokens, plan.context_tokens),
                block_start=0,
            )
            for start in range(0, plan.context_tokens, job.span_tokens)
        ]
        yield from Forwards(job).steps(cache, spans)
        cache.finish()
        return stores
