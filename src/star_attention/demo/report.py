"""What the reader is told: one table, two sentences made from the numbers, and the files."""

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
from star_attention.planning.plan import counted, format_size

PAPER_LOSS = "25 to 40 points"
"""Accuracy that the paper's models lose without an anchor, at 128K and 64K (arXiv 2411.17116, ablation of the anchor)."""

COLUMNS = ("method", "facts found", "encode s", "first token s", "KV MiB")


def write(result: DemoResult, out: Path) -> None:
    """heatmap.png, demo.html and demo.json in a folder that exists. Raises `MissingPackageError` and `OSError`."""
    heatmap.write_png(result, out / "heatmap.png", caption(result))
    (out / "demo.html").write_text(
        page.html(result, summary(result), notes(result), caption(result)), encoding="utf-8"
    )
    (out / "demo.json").write_text(json.dumps(as_dict(result), indent=2) + "\n", encoding="utf-8")


def print_report(result: DemoResult, console: Console) -> None:
    """The table, the two sentences, and what must be known to read them."""
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
    """The same as plain text."""
    text = io.StringIO()
    print_report(result, Console(file=text, width=100, color_system=None))
    return text.getvalue().rstrip()


def title(result: DemoResult) -> str:
    samples = result.settings["samples"]
    texts = "one text" if samples == 1 else f"each of {samples} texts"
    return f"{format_size(result.length)} tokens, {result.settings['facts']} facts in {texts}"


def row_cells(row: Row) -> tuple[str, ...]:
    """The cells under `COLUMNS`; ratios are against dense."""
    sizes = f" ({row.num_blocks} x {format_size(row.block_size)})" if row.mode == STAR else ""
    if row.mode == SMALL:
        sizes = f" ({row.anchor_size})"
    return (
        row.mode + sizes,
        f"{row.score} ({row.score.accuracy:.0%})",
        _against(f"{row.encode_s:.2f}", row.encode_ratio, row.mode),
        _against(f"{row.first_token_s:.2f}", row.first_token_ratio, row.mode),
        _against(f"{row.kv_bytes / 1024**2:.0f}", row.kv_ratio, row.mode),
    )


def _against(value: str, ratio: float, mode: str) -> str:
    return value if mode == DENSE else f"{value} (x {ratio:.2f})"


def summary(result: DemoResult) -> tuple[str, str]:
    """Two sentences: Star Attention beside dense, and what the anchor does for it."""
    dense, star, small, none = result.rows
    share = star.encode_ratio
    if share < 0.95:
        pace = f"encodes the text in {share:.0%} of the time ({star.encode_s:.1f} s instead of {dense.encode_s:.1f} s)"
    elif share <= 1.05:
        pace = (
            f"takes as long to encode the text ({star.encode_s:.1f} s and {dense.encode_s:.1f} s)"
        )
    else:
        pace = f"takes {share:.2f} times as long to encode the text ({star.encode_s:.1f} s and {dense.encode_s:.1f} s)"
    first = (
        f"At {format_size(result.length)} tokens Star Attention finds {star.score} planted facts,"
        f" {_beside(star, dense)} dense attention{'' if _same(star, dense) else f' ({dense.score.correct})'}, and {pace}."
    )
    found = f"with the anchor cut to {small.anchor_size} tokens it finds {small.score.correct}, with none {none.score.correct}"
    lost = star.score.accuracy - none.score.accuracy
    if lost <= 0.05:
        verdict = f"so this {_model(result)} hardly needs an anchor for such questions"
        if none.score.accuracy < 0.5:
            verdict = "but too little is found to say whether an anchor is needed"
    else:
        verdict = (
            f"so this {_model(result)} needs its anchor, and loses {lost * 100:.0f} points without"
        )
    return first, f"{found[0].upper()}{found[1:]}, {verdict}."


def _model(result: DemoResult) -> str:
    parameters = result.settings["parameters"]
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
    return f"{'' if parameters >= 1e9 else 'small '}model ({size} parameters)"


def _same(one: Row, other: Row) -> bool:
    return one.score.correct == other.score.correct


def _beside(star: Row, dense: Row) -> str:
    if _same(star, dense):
        return "as many as"
    return "more than" if star.score.correct > dense.score.correct else "fewer than"


def notes(result: DemoResult) -> list[str]:
    """What the table does not say by itself."""
    _, star, _, none = result.rows
    kv = "equal dense's" if star.kv_ratio == 1 else f"are x {star.kv_ratio:.2f} of dense's"
    asked = none.score.asked
    times = "were measured once" if result.settings["samples"] == 1 else "are medians"
    unseen = min(1.0, 3 / asked)  # the rule of three: upper 95 % bound of a rate that never showed
    return [
        f"Memory: on one device Star Attention's keys and values {kv}, since those of every token are kept once; what it"
        " saves here is work. Over several devices each would hold the share of its blocks.",
        "The anchor: language models give much attention to the first tokens that they see (an attention sink). In the paper's"
        f" models every block without an anchor grows a sink of its own, and they lose {PAPER_LOSS}. With one, a single sink is"
        " left, at the head of the text, as in dense attention.",
        f"Precision: with {asked} questions a method, a few points are chance (no miss in {asked} leaves room for a rate of"
        f" up to {unseen:.0%}). Times {times} on this machine; each ratio (x) is against dense.",
    ]


def caption(result: DemoResult) -> str:
    asked = {
        result.score(mode, length, tenth).asked
        for mode in (DENSE, STAR)
        for length in result.lengths
        for tenth in result.bands
    }
    least, most = min(asked), max(asked)
    questions = counted(least, "question") if least == most else f"{least} to {most} questions"
    return f"Each cell is the share of {questions} answered; star has blocks of a quarter of the length, an anchor as large."


def as_dict(result: DemoResult) -> dict[str, Any]:
    """demo.json: the table, the sentences, the heat map and every answer."""
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
