"""`bench decode`: milliseconds per token, and the time to read weights, keys and values once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from torch import Tensor

from star_attention.bench import figures
from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.models import random_ids, weight_bytes_per_token
from star_attention.engine import StarLLM
from star_attention.planning.plan import format_size
from star_attention.tools import machine
from star_attention.tools.machine import Ceilings
from star_attention.tools.plotting import GRAY, new_figure


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One length, with compiled layers and CUDA graphs or without; times are medians.

    Attributes:
        context: length in tokens.
        block: block size in tokens.
        compiled: True with compiled layers and CUDA graphs.
        queries: number of queries in a batch.
        query_tokens, tokens: length of a query and of an answer.
        kv_dtype, kv_device: as for `StarLLM`.
        token_s: time per token of an answer through `StarLLM.generate`:
            (time of all tokens - time of one) / (tokens - 1).
        floor_s: bytes of weights, keys and values over the copy rate.
        ttft_s: time to the first token of a further query on the same context.
        first_s: time of the first query, which compiles and captures.
        failed: the reason if there are no numbers.
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


@dataclass(frozen=True, kw_only=True)
class Decode(Benchmark[DecodeRow]):
    """Settings of `bench decode`.

    Attributes:
        contexts: lengths in tokens.
        block: block size in tokens; shorter contexts are one block.
        queries: number of queries in a batch.
        query_tokens, answer_tokens: length of a query and of an answer.
        repeats: runs of each, of which the median counts.
        compile: True or False; None measures both on a GPU and False elsewhere.
        kv_dtype, kv_device: as for `StarLLM`.
    """

    name: ClassVar[str] = "decode"
    contexts: list[int]
    block: int
    queries: int
    query_tokens: int
    answer_tokens: int
    repeats: int
    compile: bool | None = None
    kv_dtype: str | None = None
    kv_device: str | None = None

    @property
    def longest_input(self) -> int:
        return max(self.contexts) + self.query_tokens + self.answer_tokens

    def run(self, target: Target) -> list[DecodeRow]:
        queries = [
            random_ids(target.model, self.query_tokens, seed) for seed in range(1, self.queries + 1)
        ]
        cases = [
            (context, compiled) for context in self.contexts for compiled in self._modes(target)
        ]
        rows = []
        for number, (context, compiled) in enumerate(cases, 1):
            mode = "compiled" if compiled else "plain"
            target.progress(f"{number} of {len(cases)}: {mode}, context {format_size(context)}")
            row = self._empty_row(context, compiled, target)
            try:
                rows.append(self._timed(row, queries, target))
            except machine.OUT_OF_MEMORY:
                rows.append(replace(row, failed="out of memory"))
        return rows

    def _modes(self, target: Target) -> list[bool]:
        if self.compile is not None:
            return [self.compile]
        return [True, False] if target.device.type == "cuda" else [False]

    def _empty_row(self, context: int, compiled: bool, target: Target) -> DecodeRow:
        kv_bytes = context * target.shape.stored_bytes_per_token(self.kv_dtype)
        floor_bytes = weight_bytes_per_token(target.model) + kv_bytes
        return DecodeRow(
            context=context,
            block=min(self.block, context),
            compiled=compiled,
            queries=self.queries,
            query_tokens=self.query_tokens,
            tokens=self.answer_tokens,
            kv_dtype=self.kv_dtype,
            kv_device=self.kv_device,
            floor_s=floor_bytes / target.ceilings.bytes_per_s,
        )

    def _timed(self, row: DecodeRow, queries: list[Tensor], target: Target) -> DecodeRow:
        """Complete a row. The context's memory is free after this call, whether or not it fails."""
        star = StarLLM(
            target.model,
            block_size=row.block,
            compile=row.compiled,
            comm="solo",
            kv_dtype=self.kv_dtype,
            kv_device=self.kv_device,
        )
        context = star.encode(random_ids(target.model, row.context))
        generate = partial(star.generate, context, queries, ignore_eos=True)

        def seconds(tokens: int) -> float:
            return machine.time_once(partial(generate, max_new_tokens=tokens), target.device)

        first_s = seconds(2)
        all_tokens_s = median([seconds(row.tokens) for _ in range(self.repeats)])
        one_token_s = median([seconds(1) for _ in range(self.repeats)])
        return replace(
            row,
            token_s=(all_tokens_s - one_token_s) / max(1, row.tokens - 1),
            ttft_s=one_token_s,
            first_s=first_s,
        )

    def table(self, rows: list[DecodeRow]) -> list[tuple[str, ...]]:
        header = (
            "context",
            "layers",
            "ms per token",
            "floor ms",
            "over floor",
            "tok/s",
            "next query s",
            "first query s",
        )
        return [header, *(_cells(row) for row in rows)]

    def draw(self, rows: list[DecodeRow], ceilings: Ceilings, folder: Path) -> list[Path]:
        return draw(rows, folder)


def _cells(row: DecodeRow) -> tuple[str, ...]:
    context, layers = format_size(row.context), "compiled" if row.compiled else "plain"
    if row.token_s is None or row.ttft_s is None or row.first_s is None:
        return context, layers, row.failed or "", "", "", "", "", ""
    return (
        context,
        layers,
        f"{row.token_s * 1e3:,.3g}",
        f"{row.floor_s * 1e3:,.3g}",
        f"{row.over_floor:.2f}",
        f"{row.queries / row.token_s:,.0f}",
        f"{row.ttft_s:,.3f}",
        f"{row.first_s:,.3g}",
    )


def draw(rows: list[DecodeRow], folder: Path) -> list[Path]:
    """Draw milliseconds per token into an existing folder; return the files written."""
    return [figures.save(token_figure(rows), folder / "decode.png")]


def token_figure(rows: list[DecodeRow]) -> Any:
    """Draw milliseconds per token by length, with the time that reading the bytes once takes."""
    figure, axes = new_figure("context, tokens", "ms per token")
    for index, compiled in enumerate(sorted({row.compiled for row in rows}, reverse=True)):
        points = [
            (row.context, row.token_s * 1e3)
            for row in rows
            if row.compiled == compiled and row.token_s is not None
        ]
        axes.plot(
            [length for length, _ in points],
            [milliseconds for _, milliseconds in points],
            color=figures.color(index),
            marker=figures.marker(index),
            label="compiled, CUDA graphs" if compiled else "plain",
        )
    floors = sorted({(row.context, row.floor_s * 1e3) for row in rows})
    lengths = [length for length, _ in floors]
    axes.plot(
        lengths,
        [milliseconds for _, milliseconds in floors],
        color=GRAY,
        label="floor",
        **figures.floor_style(lengths, "--"),
    )
    figures.finish(axes, lengths)
    axes.set_ylim(bottom=0)
    return figure
