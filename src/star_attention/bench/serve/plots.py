"""The pictures of `bench serve`: rates, and what clients wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from star_attention.bench import figures
from star_attention.bench.serve.rows import ServeRow, overhead, table
from star_attention.planning.sizes import counted
from star_attention.tools import machine
from star_attention.tools.plotting import BLACK, GRAY, new_figure

_RATES = (
    ("over HTTP", "tokens_per_s"),
    ("in Python", "python_tokens_per_s"),
    ("floor: bytes at the copy's rate", "floor_tokens_per_s"),
)
_TIMES = (
    ("first token, median", "first_p50_s"),
    ("first token, p95", "first_p95_s"),
    ("gap, p95", "gap_p95_s"),
    ("longest gap", "longest_gap_s"),
)


def draw(rows: list[ServeRow], folder: Path) -> list[Path]:
    """Draw the pictures, and write the tables, into an existing folder; return the files."""
    measured = [row for row in rows if row.failed is None]
    page = folder / "serve.md"
    page.write_text(_page(rows), encoding="utf-8")
    if not measured:
        return [page]
    return [
        page,
        figures.save(rates_figure(measured), folder / "serve-rates.png"),
        figures.save(times_figure(measured), folder / "serve-times.png"),
    ]


def rates_figure(rows: list[ServeRow]) -> Any:
    """Draw tokens per second of each case, over HTTP, in Python, and at most."""
    figure, axes = new_figure("case", "tokens per second")
    _bars(axes, [row for row in rows if row.answer_tokens > 1], _RATES, 1.0)
    return figure


def times_figure(rows: list[ServeRow]) -> Any:
    """Draw how long clients of each case wait, in milliseconds."""
    figure, axes = new_figure("case", "milliseconds")
    _bars(axes, rows, _TIMES, 1e3)
    axes.set_yscale("log")
    return figure


def _bars(
    axes: Any, rows: list[ServeRow], fields: tuple[tuple[str, str], ...], factor: float
) -> None:
    width = 0.8 / len(fields)
    for index, (label, field) in enumerate(fields):
        values = [getattr(row, field) for row in rows]
        places = [at for at, value in enumerate(values) if value]
        color = GRAY if "floor" in label else figures.color(index)
        axes.bar(
            [at + (index - (len(fields) - 1) / 2) * width for at in places],
            [values[at] * factor for at in places],
            width * 0.9,
            color=color,
            edgecolor=BLACK,
            linewidth=0.4,
            label=label,
        )
    axes.set_xticks(
        range(len(rows)), [f"{row.case}\n{counted(row.clients, 'client')}" for row in rows]
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _page(rows: list[ServeRow]) -> str:
    """Return the tables as Markdown."""
    parts = [f"# bench serve\n\n`{machine.command()}`"]
    for lines in filter(None, (table(rows), overhead(rows))):
        head, *rest = ("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n".join([head, "|---" * len(lines[0]) + "|", *rest]))
    return "\n\n".join(parts) + "\n"
