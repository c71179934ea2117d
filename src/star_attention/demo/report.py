"""The demo's reports: a table, two sentences about it, notes, and files."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from star_attention.demo import heatmap, page
from star_attention.demo.result import DENSE, SMALL, STAR, DemoResult, Row, band_name
from star_attention.planning.sizes import counted, format_size

PAPER_LOSS = "25 to 40 points"
"""Accuracy that the paper's models lose without an anchor, at 64K and 128K (arXiv 2411.17116,
ablation of the anchor)."""

COLUMNS = ("method", "facts found", "encode s", "first token s", "KV MiB")


def write(result: DemoResult, out: Path) -> None:
    """Write heatmap.png, demo.html and demo.json to an existing folder.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    heatmap.write_png(result, out / "heatmap.png", caption(result))
    (out / "demo.html").write_text(
        page.html(result, summary(result), notes(result), caption(result)), encoding="utf-8"
    )
    (out / "demo.json").write_text(json.dumps(as_dict(result), indent=2) + "\n", encoding="utf-8")


def print_report(result: DemoResult, console: Console) -> None:
    """Print the table, the summary and the notes."""
    table = Table(title=title(result), title_justify="left", title_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in result.rows:
        table.add_row(*row_cells(row), style="bold" if row.mode == STAR else None)
    console.print(table)
    console.print(" ".join(summary(result)), soft_wrap=not console.is_terminal, highlight=False)
    console.print()
    for note in notes(result):
        console.print(note, style="dim", soft_wrap=not console.is_terminal, highlight=False)


def as_text(result: DemoResult) -> str:
    """Return the same as plain text."""
    text = io.StringIO()
    print_report(result, Console(file=text, width=100, color_system=None))
    return text.getvalue().rstrip()


def title(result: DemoResult) -> str:
    samples = result.settings["samples"]
    texts = "one text" if samples == 1 else f"each of {samples} texts"
    return f"{format_size(result.length)} tokens, {result.settings['facts']} facts in {texts}"


def row_cells(row: Row) -> tuple[str, ...]:
    """Return the cells under `COLUMNS`; ratios are relative to dense."""
    sizes = f" ({row.num_blocks} x {format_size(row.block_size)})" if row.mode == STAR else ""
    if row.mode == SMALL:
        sizes = f" ({row.anchor_size})"
    return (
        row.mode + sizes,
        f"{row.score} ({row.score.accuracy:.0%})",
        _with_ratio(f"{row.encode_s:.2f}", row.encode_ratio, row.mode),
        _with_ratio(f"{row.first_token_s:.2f}", row.first_token_ratio, row.mode),
        _with_ratio(f"{row.kv_bytes / 1024**2:.0f}", row.kv_ratio, row.mode),
    )


def _with_ratio(value: str, ratio: float, mode: str) -> str:
    return value if mode == DENSE else f"{value} (x {ratio:.2f})"


def summary(result: DemoResult) -> tuple[str, str]:
    """Return two sentences: one compares Star Attention with dense, one is about its anchor."""
    dense, star, small, none = result.rows
    return (
        f"At {format_size(result.length)} tokens Star Attention finds {star.score} planted facts,"
        f" {_compare_scores(star, dense)}, and {_compare_times(star, dense)}.",
        f"With the anchor cut to {small.anchor_size} tokens it finds {small.score.correct}, with"
        f" none {none.score.correct}, {_anchor_verdict(star, none, _model(result))}.",
    )


def _compare_scores(star: Row, dense: Row) -> str:
    by_star, by_dense = star.score.correct, dense.score.correct
    if by_star == by_dense:
        return "as many as dense attention"
    return f"{'more' if by_star > by_dense else 'fewer'} than dense attention ({by_dense})"


def _compare_times(star: Row, dense: Row) -> str:
    ratio, star_s, dense_s = star.encode_ratio, f"{star.encode_s:.1f} s", f"{dense.encode_s:.1f} s"
    if ratio < 0.95:
        return f"encodes the text in {ratio:.0%} of the time ({star_s} instead of {dense_s})"
    if ratio <= 1.05:
        return f"takes as long to encode the text ({star_s} and {dense_s})"
    return f"takes {ratio:.2f} times as long to encode the text ({star_s} and {dense_s})"


def _anchor_verdict(star: Row, none: Row, model: str) -> str:
    lost = star.score.accuracy - none.score.accuracy
    if lost > 0.05:
        return f"so this {model} needs its anchor, and loses {lost * 100:.0f} points without it"
    if none.score.accuracy < 0.5:
        return "but too few facts are found to tell if it needs an anchor"
    return f"so this {model} hardly needs an anchor for such questions"


def _model(result: DemoResult) -> str:
    parameters = result.settings["parameters"]
    if parameters >= 1e9:
        return f"model ({parameters / 1e9:.1f}B parameters)"
    return f"small model ({parameters / 1e6:.0f}M parameters)"


def notes(result: DemoResult) -> list[str]:
    """Return further notes for readers of the table."""
    _, star, _, none = result.rows
    questions = none.score.asked
    times = "were measured once" if result.settings["samples"] == 1 else "are medians"
    # The rule of three: the upper 95 % bound of the rate of something that never happened.
    miss_rate = min(1.0, 3 / questions)
    kv_size = "the same size as" if star.kv_ratio == 1 else f"x {star.kv_ratio:.2f} the size of"
    return [
        f"Memory: on one device Star Attention's keys and values have {kv_size} dense attention's:"
        " those of every token are stored once, and the saving is in work. On several devices each"
        " stores those of its own blocks.",
        "The anchor: language models pay much attention to the first tokens that they see (an"
        " attention sink). In the paper's models every block without an anchor grows a sink of its"
        f" own, and they lose {PAPER_LOSS}. With an anchor there is a single sink, at the start of"
        " the text, as in dense attention.",
        f"Precision: with {questions} questions per method, a few points are chance (no miss in"
        f" {questions} is consistent with a miss rate of up to {miss_rate:.0%}). Times {times} on"
        " this machine; each ratio (x) is relative to dense.",
    ]


def caption(result: DemoResult) -> str:
    counts = {
        result.score(mode, length, tenth).asked
        for mode in (DENSE, STAR)
        for length in result.lengths
        for tenth in result.bands
    }
    least, most = min(counts), max(counts)
    questions = counted(least, "question") if least == most else f"{least} to {most} questions"
    return (
        f"Each cell is the fraction of {questions} answered correctly. Star Attention's blocks are"
        " a quarter of the length, and its anchor is as large."
    )


def as_dict(result: DemoResult) -> dict[str, Any]:
    """Return the contents of demo.json: the table, the sentences, the heat map and all answers."""
    return {
        "settings": result.settings,
        "versions": result.versions,
        "total_s": result.total_s,
        "summary": list(summary(result)),
        "table": [
            {"mode": row.mode, "accuracy": row.score.accuracy, **asdict(row.score)}
            | {name: value for name, value in asdict(row).items() if name not in ("mode", "score")}
            for row in result.rows
        ],
        "heatmap": {
            mode: [
                {
                    "length": length,
                    "depth": band_name(tenth),
                    **asdict(result.score(mode, length, tenth)),
                }
                for length in result.lengths
                for tenth in result.bands
            ]
            for mode in (DENSE, STAR)
        },
        "trials": [asdict(trial) for trial in result.trials],
    }
