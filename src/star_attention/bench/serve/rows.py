"""The rows of `bench serve`, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from star_attention.bench.ranks import in_short
from star_attention.bench.serve.crowd import Report
from star_attention.planning.sizes import format_size

CASES = ("single", "shared", "again", "spread", "encode", "leave")
"""A client of one long context; many of them; a further question on it, alone; clients of contexts
of their own; a long context that is encoded beside them; clients of which half leave."""
SINGLE, SHARED, AGAIN, SPREAD, ENCODE, LEAVE = CASES
IN_PYTHON = (SINGLE, SHARED, AGAIN, SPREAD)
"""Cases whose work is also done in Python."""


@dataclass(frozen=True, kw_only=True)
class ServeRow:
    """One case. Times are in seconds, and of clients.

    Attributes:
        case: one of `CASES`.
        context: length of each context in tokens.
        texts: number of contexts, which clients take in turn.
        clients: clients at once; each asks again as soon as it has an answer.
        answer_tokens: tokens of an answer.
        tokens_per_s: tokens per second of all clients, from the first request to the last text.
        python_tokens_per_s: the same by a batch in Python.
        read_bytes: bytes of weights, keys and values that a step reads, each context once.
        floor_tokens_per_s: clients over the time to read these at the copy rate.
        first_p50_s, first_p95_s: from a request to its first text.
        python_first_s: median time of the same by `generate` in Python.
        gap_p50_s, gap_p95_s, longest_gap_s: between two pieces of an answer.
        encode_s: time to encode the context beside the clients.
        encode_alone_s: time to encode it alone.
        answers: answers that ended.
        left: answers that their clients left.
        errors: answers that failed.
        error: the first of these errors.
        client_cpu: share of a core that the busiest process of clients used.
        server_cpu: cores that the server used; None where it is not known.
        failed: the reason if there are no numbers.
    """

    case: str
    context: int
    texts: int
    clients: int
    answer_tokens: int
    tokens_per_s: float | None = None
    python_tokens_per_s: float | None = None
    read_bytes: int | None = None
    floor_tokens_per_s: float | None = None
    first_p50_s: float | None = None
    first_p95_s: float | None = None
    python_first_s: float | None = None
    gap_p50_s: float | None = None
    gap_p95_s: float | None = None
    longest_gap_s: float | None = None
    encode_s: float | None = None
    encode_alone_s: float | None = None
    answers: int = 0
    left: int = 0
    errors: int = 0
    error: str | None = None
    client_cpu: float | None = None
    server_cpu: float | None = None
    failed: str | None = None


def heard(report: Report, *, start: float | None = None, end: float | None = None) -> Any:
    """Return the fields of a row that a report fills.

    Args:
        report: what the clients heard.
        start, end: count gaps between these times only.
    """
    gaps, errors = sorted(report.gaps_s(start, end)), report.errors
    first = sorted(report.first_s)
    ended = sum(each.ended is not None and each.error is None for each in report.answers)
    return dict(
        tokens_per_s=report.tokens_per_s,
        first_p50_s=percentile(first, 0.5),
        first_p95_s=percentile(first, 0.95),
        gap_p50_s=percentile(gaps, 0.5),
        gap_p95_s=percentile(gaps, 0.95),
        longest_gap_s=gaps[-1] if gaps else None,
        answers=ended,
        left=len(report.answers) - ended - len(errors),
        errors=len(errors),
        error=errors[0] if errors else None,
        client_cpu=report.client_cpu,
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value that this share of sorted values does not exceed; None of no values."""
    return values[min(int(share * len(values)), len(values) - 1)] if values else None


_HEADER = (
    *("case", "context", "texts", "clients", "tok/s", "x single", "of Python", "of floor"),
    *("first ms p50", "p95", "gap ms p95", "longest", "encode / alone"),
    *("errors", "cores, server", "client"),
)


def table(rows: list[ServeRow]) -> list[tuple[str, ...]]:
    """Return the cells of the table."""
    lines = [list(_HEADER), *(_cells(row, _single(rows)) for row in rows)]
    return [tuple(line + [""] * (len(_HEADER) - len(line))) for line in lines]


def in_python(row: ServeRow) -> str:
    """Return what was measured of a row without a server, in a line."""
    if row.python_first_s is not None:
        return f"first token after {1e3 * row.python_first_s:,.1f} ms"
    return f"{_number(row.python_tokens_per_s, '{:,.0f}')} tok/s"


def _single(rows: list[ServeRow]) -> ServeRow | None:
    return next((row for row in rows if row.case == SINGLE), None)


def _cells(row: ServeRow, single: ServeRow | None) -> list[str]:
    start = [row.case, format_size(row.context), str(row.texts), str(row.clients)]
    if row.failed is not None:
        return [*start, in_short(row.failed)]
    rate = single.tokens_per_s if single is not None and row.case == SHARED else None
    return [
        *start,
        "" if row.answer_tokens == 1 else _number(row.tokens_per_s, "{:,.0f}"),
        _over(row.tokens_per_s, rate),
        _over(row.tokens_per_s, row.python_tokens_per_s),
        _over(row.tokens_per_s, row.floor_tokens_per_s),
        *(_number(s, "{:,.1f}", 1e3) for s in (row.first_p50_s, row.first_p95_s)),
        *(_number(s, "{:,.1f}", 1e3) for s in (row.gap_p95_s, row.longest_gap_s)),
        _over(row.encode_s, row.encode_alone_s),
        str(row.errors),
        _number(row.server_cpu, "{:.2f}"),
        _number(row.client_cpu, "{:.2f}"),
    ]


def overhead(rows: list[ServeRow]) -> list[tuple[str, ...]]:
    """Return the cells of a table of what HTTP adds to the same work in Python; or none."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.first_p50_s is not None and row.python_first_s is not None:
            added = row.first_p50_s - row.python_first_s
            times = (f"{s * 1e3:.1f} ms" for s in (row.first_p50_s, row.python_first_s, added))
            lines.append((f"{row.case}, first token", *times))
        if row.tokens_per_s is not None and row.python_tokens_per_s is not None:
            share = 1 - row.tokens_per_s / row.python_tokens_per_s
            rates = (f"{r:,.0f} tok/s" for r in (row.tokens_per_s, row.python_tokens_per_s))
            lines.append((f"{row.case}, throughput", *rates, f"{share:.1%}"))
    return [("what", "over HTTP", "in Python", "overhead"), *lines] if lines else []


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)


def _over(value: float | None, other: float | None) -> str:
    return "" if not value or not other else f"{value / other:.2f}"
