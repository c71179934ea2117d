"""Rows of decode forwards, with the tokens and logits that `generate` gives for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from star_attention import EncodedContext, StarLLM
from star_attention.hf.cache.rows import RowKV, RowSet
from star_attention.hf.execution.request import Request
from star_attention.hf.execution.rows import RowForwards


@dataclass(kw_only=True)
class Row:
    """A row, and its tokens and logits as `generate` gives them."""

    kv: RowKV
    token_ids: list[int]
    logits_SV: torch.Tensor


def prefilled(
    star: StarLLM, context: EncodedContext, *queries: list[int], steps: int = 3
) -> list[Row]:
    """Read queries of one context together, and take their rows over."""
    request = Request(
        handle=star.runtime.handle,
        context_ids_L=context.token_ids,
        plan=context.plan,
        shard=context.kv,
        rope_length=context.rope_length,
        queries=list(queries),
        tokens_per_forward=64,
        comm=star.runtime.comm,
    )
    cache = request.cache(request.query_tokens)
    for ids_BS, positions_BS in request.forwards(cache):
        request.forward(ids_BS, positions_BS, cache)
    rows = []
    for number, query in enumerate(queries):
        reply: Any = star.generate(
            context, query, max_new_tokens=steps + 1, ignore_eos=True, return_logits=True
        )
        kv = RowKV.of(cache, context.kv, number, len(queries))
        rows.append(Row(kv=kv, token_ids=reply.token_ids, logits_SV=reply.logits))
    return rows


def step(forwards: RowForwards, rows: list[Row], step: int, row_set: RowSet) -> torch.Tensor:
    """Run the forward of each row's token of this number."""
    tokens = torch.tensor([row.token_ids[step] for row in rows])
    return forwards.run(row_set, tokens, None)
