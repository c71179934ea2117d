"""StreamingLLM: every token sees the first few tokens (sinks) and a window of the last ones (Xiao et al.: arXiv 2309.17453).

A baseline of the paper. `anchor_size` is the number of sinks (4, where it is left out), `block_size` the window. All else is
forgotten, so that memory does not grow with the context, and neither does what a query can find. Tokens keep their positions;
the StreamingLLM paper counts them anew within the cache, for texts longer than what the model was trained on.
"""

from __future__ import annotations

from torch import Tensor

from star_attention import phase1
from star_attention.config import StarConfig
from star_attention.distributed.comm import Comm
from star_attention.errors import InvalidInputError
from star_attention.hf.cache.window import WindowCache
from star_attention.hf.execution.handle import ModelHandle
from star_attention.methods.star import Star
from star_attention.planning.plan import BlockPlan, Span, resolve_sizes
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, VisibleRange

SINKS = 4
"""Enough, by the StreamingLLM paper's table 2."""


class StreamingLLM(Star):
    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        if ranks > 1:
            raise InvalidInputError(
                f"method 'streaming_llm' runs on one rank, not on {ranks}: each token waits for those before it; use 'star'"
            )
        window, _ = resolve_sizes(context_tokens, config.block_size, None)
        sinks = min(SINKS, window) if config.anchor_size is None else config.anchor_size
        return BlockPlan.resolve(context_tokens, window, sinks, ranks)

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        sinks = min(plan.anchor_size, plan.context_tokens)
        recent = max(sinks, plan.context_tokens - plan.block_size)
        runs = ((0, sinks), (recent, plan.context_tokens))
        return (Segments((start, stop) for start, stop in runs if start < stop),)

    def visible(self, plan: BlockPlan) -> VisibleRange | None:
        return VisibleRange(first=plan.anchor_size, recent=plan.block_size)

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
        kv_format = self.kv_format(config)
        held, size = self.layout(config, plan)[0], config.forward_size(handle.device.type)
        expands: list[bool | None] = [None] * len(handle.windows)
        stores = [
            ContextKV.empty(held, expands, kv_format, visible=self.visible(plan)) for _ in ids_BL
        ]
        cache = WindowCache(plan, stores, handle.windows, comm)
        budget = max(1, size // ids_BL.shape[0])
        spans = [
            Span(start=start, stop=min(start + budget, plan.context_tokens), block_start=0)
            for start in range(0, plan.context_tokens, budget)
        ]
        phase1.Forwards(handle, ids_BL, plan, comm, size, rope_length, progress).run(cache, spans)
        cache.finish()
        return stores
