"""Answering: milliseconds a token beside the time that reading weights, keys and values once takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from star_attention.bench.subject import random_ids, weight_bytes_per_token
from star_attention.engine import StarLLM
from star_attention.planning.cost import ModelShape
from star_attention.planning.plan import format_size
from star_attention.tools import machine
from star_attention.tools.machine import Ceilings, Progress


@dataclass(frozen=True, kw_only=True)
class Row:
    """One length. token_s: (time of all tokens - time of one) / (tokens - 1), through `StarLLM.generate`; medians.

    floor_s: the bytes of weights, keys and values over the copy's rate. ttft_s: to the first token of a further query on the same
    context. first_s: of the first query, which compiles and captures.
    """

    context: int
    block: int
    compiled: bool
    queries: int
    query_tokens: int
    tokens: int
    kv_dtype: str | None = None
    kv_device: str | None = None
    token_s: float | None = None
    floor_s: float = 0.0
    ttft_s: float | None = None
    first_s: float | None = None
    failed: str | None = None

    @property
    def over_floor(self) -> float | None:
        return None if self.token_s is None else self.token_s / self.floor_s


def run(
    model: Any,
    shape: ModelShape,
    ceilings: Ceilings,
    *,
    contexts: list[int],
    block: int,
    queries: int,
    query_tokens: int,
    tokens: int,
    repeats: int,
    compile: list[bool],
    kv_dtype: str | None = None,
    kv_device: str | None = None,
    progress: Progress,
) -> list[Row]:
    """Answers of `tokens` tokens to `queries` random queries at once, for each length; with what `compile` brings and without."""
    device = next(model.parameters()).device
    asked = [random_ids(model, query_tokens, seed) for seed in range(1, queries + 1)]
    rows: list[Row] = []
    for context in contexts:
        size = min(block, context)
        floor_bytes = weight_bytes_per_token(model) + context * shape.kept_bytes_per_token(kv_dtype)
        for compiled in compile:
            what = "compiled" if compiled else "plain"
            progress(
                f"{len(rows) + 1} of {len(contexts) * len(compile)}: {what}, context {format_size(context)}"
            )
            row: dict[str, Any] = dict(
                context=context, block=size, compiled=compiled, queries=queries, tokens=tokens
            )
            row |= dict(query_tokens=query_tokens, kv_dtype=kv_dtype, kv_device=kv_device)
            row["floor_s"] = floor_bytes / ceilings.bytes_per_s
            place: dict[str, Any] = dict(kv_dtype=kv_dtype, kv_device=kv_device)
            star = StarLLM(model, block_size=size, compile=compiled, comm="solo", **place)
            try:
                times = _times(star, random_ids(model, context), asked, tokens, repeats, device)
            except machine.OUT_OF_MEMORY:
                rows.append(Row(**row, failed="out of memory"))
                continue
            rows.append(Row(**row, **times))
    return rows


def _times(
    star: StarLLM,
    ids_L: Tensor,
    asked: list[Tensor],
    tokens: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    """The times of a `Row`. (A function, so that the context's memory is free when it ends, however it does.)"""
    answer = partial(star.generate, star.encode(ids_L), asked, ignore_eos=True)
    first_s = machine.once(partial(answer, max_new_tokens=2), device)
    whole = [machine.once(partial(answer, max_new_tokens=tokens), device) for _ in range(repeats)]
    one = [machine.once(partial(answer, max_new_tokens=1), device) for _ in range(repeats)]
    token_s = (median(whole) - median(one)) / max(1, tokens - 1)
    return dict(token_s=token_s, ttft_s=median(one), first_s=first_s)


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        (
            "context",
            "layers",
            "ms a token",
            "floor ms",
            "over floor",
            "tok/s",
            "next query s",
            "first query s",
        )
    ]
    for row in rows:
        head = (format_size(row.context), "compiled" if row.compiled else "plain")
        if row.token_s is None or row.ttft_s is None or row.first_s is None:
            lines.append((*head, row.failed or "", "", "", "", "", ""))
            continue
        lines.append(
            (
                *head,
                *(
                    f"{row.token_s * 1e3:,.3g}",
                    f"{row.floor_s * 1e3:,.3g}",
                    f"{row.over_floor:.2f}",
                ),
                *(f"{row.queries / row.token_s:,.0f}", f"{row.ttft_s:,.3f}", f"{row.first_s:,.3g}"),
            )
        )
    return lines
