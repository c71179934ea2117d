"""Ring attention: exact dense attention over sharded tokens (Liu et al.: arXiv 2310.01889).

The paper's baseline. In the zigzag layout each rank has an early and a late run of tokens, so that
causal attention is the same work for all ranks; "contiguous" is the layout that the paper used. On
one rank `ring` is `dense`.
"""

from __future__ import annotations

import torch

from star_attention import phase1
from star_attention.config import StarConfig
from star_attention.hf.cache.ring import RingCache
from star_attention.methods.dense import Dense
from star_attention.phase1 import EncodeJob, Steps
from star_attention.planning.plan import BlockPlan
from star_attention.planning.ring import ring_layout
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV
from star_attention.storage.oom import translate_oom


class Ring(Dense):
    """Dense attention whose queries stay on their rank while keys and values pass by."""

    name = "ring"

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        return ring_layout(plan.context_tokens, plan.ranks, config.ring_layout)

    def why_not_extend(self, ranks: int) -> str | None:
        if ranks == 1:
            return None
        return (
            "a ring context on several ranks cannot be extended: its layout depends on its length;"
            " encode the joined text again"
        )

    def encode(self, job: EncodeJob) -> Steps[list[ContextKV]]:
        if sum(bool(segments) for segments in job.layout) == 1:
            return (yield from super().encode(job))
        handle, comm = job.handle, job.comm
        stores = [
            phase1.empty(handle, job.segments, comm, job.kv_format, job.kept(job.kv_format))
            for _ in range(job.contexts)
        ]
        positions_S = torch.cat(
            [torch.arange(start, stop, device="cpu") for start, stop in job.segments]
        )
        tokens = job.segments.tokens
        comm.tick(f"phase 1, ring over {job.plan.context_tokens:,} tokens")
        comm.progress(0, tokens)
        with translate_oom(
            lambda: (
                f"out of memory in phase 1: ring attention runs all {tokens:,} tokens of a rank in"
                " one forward; use more ranks, a shorter context, or method 'star'"
            )
        ):
            handle.encode(
                job.ids_BL[:, positions_S].to(handle.device),
                positions_S[None].to(handle.device),
                RingCache(job.layout, stores, handle.windows, comm),
                job.rope_length,
            )
        comm.progress(tokens, tokens)
        return stores
