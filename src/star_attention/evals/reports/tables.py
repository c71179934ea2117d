"""The tables of a report: accuracy, speed, and how the run was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from star_attention.evals.reports.results import (
    Comparison,
    Results,
    Speed,
    is_timed,
    length_name,
    variant_name,
)
from star_attention.evals.reports.wording import accuracy, difference_cell, plain

Table = tuple[tuple[str, ...], ...]
"""Rows of cells; the first row is the head."""
Cells = dict[str, Any]
"""Arguments of `Results.compared`: a task, group and length."""

MAX_SIDE_BY_SIDE = 5
"""Up to this many variants are columns of a table; with more of them, each is a row."""


def accuracy_table(results: Results, rows: Sequence[tuple[str, Cells]]) -> Table:
    """Return the accuracy of each variant on some cells, and its difference from the baseline.

    Args:
        results: The run.
        rows: Title and cells of each row, or group of rows.
    """
    if len(results.variants) <= MAX_SIDE_BY_SIDE:
        return _variants_as_columns(results, rows)
    return _variants_as_rows(results, rows)


def _variants_as_columns(results: Results, rows: Sequence[tuple[str, Cells]]) -> Table:
    others = [variant for variant in results.variants if variant != results.baseline]
    head = (
        "",
        "n",
        *map(variant_name, results.variants),
        *(f"{variant_name(variant)}, difference" for variant in others),
    )
    lines = [head]
    for title, cells in rows:
        comparisons = _comparisons(results, cells)
        counts = {entry.mean.n for entry in comparisons.values() if entry is not None}
        if counts:
            n = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
            means = [
                "–" if entry is None else accuracy(entry.mean) for entry in comparisons.values()
            ]
            differences = [difference_cell(comparisons[variant]) for variant in others]
            lines.append((title, n, *means, *differences))
        else:
            lines += _empty_row(results, title, cells, len(head))
    return tuple(lines)


def _variants_as_rows(results: Results, rows: Sequence[tuple[str, Cells]]) -> Table:
    head = ("", "variant", "n", "accuracy", "difference")
    lines: list[tuple[str, ...]] = [head]
    for title, cells in rows:
        comparisons = _comparisons(results, cells)
        if not any(comparisons.values()):
            lines += _empty_row(results, title, cells, len(head))
            continue
        for index, (variant, comparison) in enumerate(comparisons.items()):
            row_title = title if index == 0 else ""
            lines.append((row_title, *_variant_row(results, variant, comparison)))
    return tuple(lines)


def _comparisons(results: Results, cells: Cells) -> dict[str, Comparison | None]:
    return {variant: results.compared(variant, **cells) for variant in results.variants}


def _empty_row(results: Results, title: str, cells: Cells, columns: int) -> list[tuple[str, ...]]:
    """Return a row for cells that no comparison covers; none if there are no predictions either."""
    if not any(results.select(variant, **cells) for variant in results.variants):
        return []
    return [(f"{title} (no cell that all variants have)", *("–",) * (columns - 1))]


def _variant_row(results: Results, variant: str, comparison: Comparison | None) -> tuple[str, ...]:
    name = variant_name(variant)
    if comparison is None:
        return name, "–", "–", "–"
    difference = "" if variant == results.baseline else difference_cell(comparison)
    return name, f"{comparison.mean.n:,}", accuracy(comparison.mean), difference


def speed_table(results: Results) -> Table:
    """Return sizes and times of each variant at each length."""
    head = (
        "",
        "length",
        "blocks",
        "block",
        "anchor",
        "encode s",
        "answer s",
        "question s",
        "peak GiB",
    )
    speeds = [
        results.speed(variant, length)
        for variant in filter(is_timed, results.variants)
        for length in results.lengths
    ]
    return (head, *(_speed_row(speed) for speed in speeds if speed is not None))


def _speed_row(speed: Speed) -> tuple[str, ...]:
    return (
        variant_name(speed.variant),
        length_name(speed.length),
        f"{speed.blocks:,}",
        f"{speed.block_size:,}",
        f"{speed.anchor_size:,}",
        f"{speed.encode_s:.3f}",
        f"{speed.answer_s:.3f}",
        f"{speed.question_s:.3f}",
        "–" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**30:.2f}",
    )


def facts_table(results: Results) -> Table:
    """Return settings, model, machine and commands of the run; without a head."""
    settings, sessions = results.run["settings"], results.run["sessions"]

    def of_sessions(name: str) -> str:
        return ", ".join(dict.fromkeys(plain(session[name]) for session in sessions))

    options = [
        *settings["options"].items(),
        *(item for session in sessions for item in session["options"].items()),
    ]
    written = dict.fromkeys(f"{name}={plain(value)}" for name, value in options)
    prose = ", ".join(f"{name} ({sha256})" for name, sha256 in results.run["prose"].items())
    facts = {
        "suite": settings["suite"],
        "options": "; ".join(written) or "none",
        "seed": settings["seed"],
        "chat template": plain(settings["chat"]),
        "template arguments": plain(settings.get("chat_template_kwargs") or None),
        "decoding": settings["decoding"],
        "max_new_tokens": settings["max_new_tokens"] or "each sample's own",
        "reserve_tokens": settings["reserve_tokens"],
        "prose": prose or "none",
        "model": of_sessions("model"),
        "precision": settings["model"]["dtype"].removeprefix("torch."),
        "weights (sampled)": settings["model"]["weights"][:16],
        "tokenizer": plain(settings["model"]["tokenizer"])[:16],
        "hardware": of_sessions("hardware"),
        "ranks": of_sessions("ranks"),
        "versions": ", ".join(f"{name} {number}" for name, number in settings["versions"].items()),
        "git": of_sessions("git"),
        "dates": of_sessions("date"),
        "commands": of_sessions("command"),
        "settings": results.run["settings_sha256"],
    }
    return (("", ""), *((name, str(value)) for name, value in facts.items()))
