"""`bench rows`: many rows at once, on contexts of their own, that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.models import random_ids, weight_bytes_per_token
from star_attention.bench.modes import block_of
from star_attention.bench.ranks import attempt, in_short, measure
from star_attention.bench.row_runs import LONGEST, RowRuns
from star_attention.engine import StarLLM
from star_attention.planning.sizes import counted, format_size
from star_attention.planning.stored import context_bytes
from star_attention.planning.windows import LAST
from star_attention.storage.context import EncodedContext
from star_attention.tools import machine

LOCKSTEP, TURNOVER, ENCODE, TURN = CASES = ("lockstep", "turnover", "encode", "turn")
"""Rows that begin and end together; rows that end at random, each followed by another; a context
that is encoded beside rows; the next turn of a conversation."""

_SHORT = 8
"""Tokens of an answer, in runs that are not measured."""


@dataclass(frozen=True, kw_only=True)
class RowsRow:
    """One case at one length; times are medians.

    Attributes:
        case: one of `CASES`.
        context: length of each text in tokens.
        texts: number of texts, which rows take in turn.
        rows: rows at once.
        answer_tokens: tokens of an answer; in `TURNOVER` on average.
        tokens_per_s: tokens per second of all rows.
        read_bytes: bytes of weights, keys and values that a step reads, each context once.
        floor_tokens_per_s: rows over the time to read these at the copy rate.
        encode_s: time to encode a context beside the rows.
        encode_alone_s: time to encode it alone.
        longest_gap_s: longest time between two tokens of a row meanwhile.
        first_token_s: time to the first token of a conversation's second answer.
        peak_bytes: peak device memory; None where it is not measured.
        failed: the reason if there are no numbers.
    """

    case: str
    context: int
    texts: int
    rows: int
    answer_tokens: int
    tokens_per_s: float | None = None
    read_bytes: int = 0
    floor_tokens_per_s: float | None = None
    encode_s: float | None = None
    encode_alone_s: float | None = None
    longest_gap_s: float | None = None
    first_token_s: float | None = None
    peak_bytes: int | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rows(Benchmark[RowsRow]):
    """Settings of `bench rows`.

    Attributes:
        contexts: lengths of the texts in tokens.
        block: block size in tokens.
        texts: number of texts.
        rows: numbers of rows at once; cases other than `LOCKSTEP` take the largest.
        cases: names in `CASES`.
        encode_tokens: length of the context that is encoded beside rows.
        query_tokens, answer_tokens: length of a query and of an answer.
        repeats: runs of each after the first, of which the median counts.
        compile: as for `StarLLM`.
        kv_dtype, kv_device, kv_resident, kv_windows: as for `StarLLM`.
    """

    name: ClassVar[str] = "rows"
    contexts: list[int]
    block: int
    texts: int
    rows: list[int]
    cases: list[str]
    encode_tokens: int
    query_tokens: int
    answer_tokens: int
    repeats: int
    compile: bool | None = None
    kv_dtype: str | None = None
    kv_device: str | None = None
    kv_resident: float | str = 0.0
    kv_windows: str = LAST

    @property
    def longest_input(self) -> int:
        # The second turn has two queries.
        asked = 2 * self.query_tokens + LONGEST * self.answer_tokens
        return max(max(self.contexts) + asked, self.encode_tokens)

    def run(self, target: Target) -> Iterator[RowsRow]:
        rows = [
            RowsRow(
                case=case,
                context=context,
                texts=self.texts,
                rows=number,
                answer_tokens=self.answer_tokens,
            )
            for context in self.contexts
            for case in self.cases
            for number in self._numbers(case)
        ]
        encoded: list[EncodedContext] = []
        for index, row in enumerate(rows, start=1):
            if encoded and len(encoded[0]) != row.context:
                encoded.clear()
            what = f"{row.case}, context {format_size(row.context)}, {counted(row.rows, 'row')}"
            target.progress(f"{index} of {len(rows)}: {what}")
            yield self._measured(row, encoded, target)

    def _numbers(self, case: str) -> list[int]:
        if case == LOCKSTEP:
            return self.rows
        return [1] if case == TURN else [max(self.rows)]

    def _measured(self, row: RowsRow, encoded: list[EncodedContext], target: Target) -> RowsRow:
        """Measure a row. `encoded` holds the contexts, or is empty and receives them."""
        complete, reason = attempt(target.comm, lambda: self._timed(row, encoded, target))
        if complete is None:
            encoded.clear()
        return complete or replace(row, failed=reason)

    def _timed(self, row: RowsRow, encoded: list[EncodedContext], target: Target) -> RowsRow:
        star = target.engine(
            compile=self.compile,
            block_size=block_of(self.block, row.context, target),
            kv_dtype=self.kv_dtype,
            kv_device=self.kv_device,
            kv_resident=self.kv_resident,
            kv_windows=self.kv_windows,
        )
        if not encoded:
            target.check_memory(star, row.context * row.texts)
            for seed in range(row.texts):
                encoded.append(star.encode(random_ids(target.model, row.context, seed=seed)))
        runs = RowRuns(
            star=star,
            contexts=encoded,
            rows=row.rows,
            query_tokens=self.query_tokens,
            answer_tokens=self.answer_tokens,
        )
        if row.case == TURN:
            return replace(row, first_token_s=runs.next_turn(self.repeats))
        if row.case == ENCODE:
            return replace(row, **self._beside_encoding(star, runs, target))
        return self._rate(row, runs, target)

    def _rate(self, row: RowsRow, runs: RowRuns, target: Target) -> RowsRow:
        rates: list[float] = []
        work = runs.lockstep if row.case == LOCKSTEP else runs.turnover
        # A short run captures the graphs.
        short = replace(runs, answer_tokens=min(_SHORT, self.answer_tokens))
        short.lockstep() if row.case == LOCKSTEP else short.turnover()
        spent = [
            measure(lambda: rates.append(work()), target.device, target.comm)
            for _ in range(self.repeats)
        ]
        stored = context_bytes(target.shape, row.context, self.kv_dtype, self.kv_windows)
        contexts = min(row.texts, row.rows) * stored
        # Of a tail, half is there on average.
        tails = row.rows * (self.query_tokens + self.answer_tokens // 2)
        read_bytes = weight_bytes_per_token(target.model) + contexts
        read_bytes += tails * target.shape.stored_bytes_per_token(None)
        peaks = spent[-1].peak_bytes
        return replace(
            row,
            tokens_per_s=median(rates),
            read_bytes=read_bytes,
            floor_tokens_per_s=row.rows * target.ceilings.bytes_per_s / read_bytes,
            peak_bytes=None if peaks is None else max(peaks),
        )

    def _beside_encoding(self, star: StarLLM, runs: RowRuns, target: Target) -> dict[str, Any]:
        ids_L = random_ids(target.model, self.encode_tokens, seed=99)
        alone = machine.time_repeatedly(
            lambda: star.encode(ids_L), repeats=self.repeats, device=target.device
        )
        replace(runs, answer_tokens=min(_SHORT, self.answer_tokens)).lockstep()
        measured = [runs.beside_encoding(ids_L) for _ in range(self.repeats)]
        together = {name: median(each[name] for each in measured) for name in measured[0]}
        return together | dict(encode_alone_s=median(alone))

    def table(self, rows: list[RowsRow]) -> list[tuple[str, ...]]:
        header = ["context", "texts", "rows", "case", "tok/s", "of floor", "x one row"]
        header += ["x lockstep", "encode / alone", "longest gap s", "first token s"]
        lines = [header, *(_cells(row, rows) for row in rows)]
        return [tuple(line + [""] * (len(header) - len(line))) for line in lines]


def _cells(row: RowsRow, rows: list[RowsRow]) -> list[str]:
    start = [format_size(row.context), str(row.texts), str(row.rows), row.case]
    if row.failed is not None:
        return [*start, in_short(row.failed)]

    def over(value: float | None, other: float | None) -> str:
        return "" if not value or not other else f"{value / other:.2f}"

    one = lockstep_rate(row, rows, 1) if row.case == LOCKSTEP and row.rows > 1 else None
    lockstep = lockstep_rate(row, rows, row.rows) if row.case != LOCKSTEP else None
    return [
        *start,
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        over(row.tokens_per_s, row.floor_tokens_per_s),
        over(row.tokens_per_s, one),
        over(row.tokens_per_s, lockstep),
        over(row.encode_s, row.encode_alone_s),
        "" if row.longest_gap_s is None else f"{row.longest_gap_s:.3f}",
        "" if row.first_token_s is None else f"{row.first_token_s:.4f}",
    ]


def lockstep_rate(row: RowsRow, rows: list[RowsRow], number: int) -> float | None:
    """Return the tokens per second of so many rows in lockstep on the same texts."""
    for other in rows:
        same = (other.context, other.texts) == (row.context, row.texts)
        if same and other.case == LOCKSTEP and other.rows == number:
            return other.tokens_per_s
    return None
