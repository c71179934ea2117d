"""The pictures of `bench prefill`: time and memory by length, and speed-ups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from star_attention.bench import figures
from star_attention.bench.prefill import paper
from star_attention.bench.prefill.contenders import CONTENDERS
from star_attention.bench.prefill.rows import PrefillRow, series, speed_up
from star_attention.planning.published import SPEED_UPS
from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import GRAY, new_figure

_ORDER = list(CONTENDERS)


def draw(rows: list[PrefillRow], flops_per_s: float, folder: Path) -> list[Path]:
    """Draw the pictures that the rows have numbers for; return the files written.

    Args:
        rows: of one model on one device.
        flops_per_s: the ceiling, for the floor of each method's time.
        folder: an existing folder.
    """
    files = [figures.save(time_figure(rows, flops_per_s), folder / "prefill-time.png")]
    if _featured(rows):
        files.append(figures.save(_speed_up_figure(rows), folder / "prefill-speedup.png"))
    if len({row.ranks for row in rows if row.seconds is not None}) > 1:
        files.append(figures.save(ranks_figure(rows, flops_per_s), folder / "prefill-ranks.png"))
    if any(row.official or row.star for row in paper.compare(rows)):
        files.append(figures.save(paper_figure(rows), folder / "prefill-paper.png"))
    if any(row.working_bytes is not None for row in rows):
        files.append(figures.save(_memory_figure(rows), folder / "prefill-memory.png"))
    return files


def time_figure(rows: list[PrefillRow], flops_per_s: float) -> Any:
    """Draw time by length, with the time that each method's operations need at the ceiling."""
    figure, axes = new_figure("context, tokens", "seconds")
    floor_style = figures.floor_style([row.context for row in rows], ":")
    for label, group, color, marker in _styled_series(rows):
        lengths = [row.context for row in group]
        seconds = [row.seconds or 0.0 for row in group]
        floors = [(row.busiest_flops or row.flops) / flops_per_s for row in group]
        axes.plot(lengths, seconds, color=color, marker=marker, label=label)
        axes.plot(lengths, floors, color=color, linewidth=1, **floor_style)
    label = "floor: operations at the ceiling"
    axes.plot([], [], color=GRAY, label=label, **floor_style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(figures.log_ticks())
    axes.yaxis.set_major_formatter("{x:g}")
    figures.finish(axes, sorted({row.context for row in rows}))
    return figure


def ranks_figure(rows: list[PrefillRow], flops_per_s: float) -> Any:
    """Draw time by number of ranks, a line for each length and block of the featured method.

    Below each line lies the time that the busiest rank's operations need at the ceiling.
    """
    figure, axes = new_figure("ranks", "seconds")
    shown = [
        row
        for row in rows
        if row.seconds is not None and row.tensor_parallel == 1 and not row.extrapolated
    ]
    groups: dict[str, list[PrefillRow]] = {}
    for row in sorted(shown, key=lambda row: (row.context, -(row.block or 0), row.ranks)):
        if CONTENDERS[row.method].featured or CONTENDERS[row.method].needs_ranks:
            size = "" if row.block is None else f", block {format_size(row.block)}"
            groups.setdefault(f"{row.method}, {format_size(row.context)}{size}", []).append(row)
    numbers = sorted({row.ranks for row in shown})
    style = figures.floor_style(numbers, ":")
    for index, (label, group) in enumerate(groups.items()):
        points, color = [row.ranks for row in group], figures.color(index)
        seconds = [row.seconds or 0.0 for row in group]
        axes.plot(points, seconds, color=color, marker=figures.marker(index), label=label)
        floors = [(row.busiest_flops or row.flops) / flops_per_s for row in group]
        axes.plot(points, floors, color=color, linewidth=1, **style)
    axes.plot([], [], color=GRAY, label="floor: operations at the ceiling", **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(figures.log_ticks())
    axes.yaxis.set_major_formatter("{x:g}")
    figures.finish_ranks(axes, numbers)
    return figure


def paper_figure(rows: list[PrefillRow]) -> Any:
    """Draw speed-ups over ring attention by length, next to those that the paper printed."""
    figure, axes = new_figure("context, tokens", "times as fast as ring attention")
    comparisons = list(paper.compare(rows))
    series: dict[str, list[tuple[int, float]]] = {}
    for row in comparisons:
        for label, factor in (
            ("official, over the paper's ring", row.official),
            ("star, over the paper's ring", row.star),
            ("star, over the balanced ring", row.star_over_balanced),
        ):
            if factor is not None:
                key = f"{label}, {row.ranks} ranks, block {format_size(row.block)}"
                series.setdefault(key, []).append((row.context, factor))
    for index, (label, points) in enumerate(series.items()):
        axes.plot(
            [length for length, _ in points],
            [factor for _, factor in points],
            color=figures.color(index),
            marker=figures.marker(index),
            label=label,
        )
    lengths = {row.context for row in comparisons} | {row.context for row in SPEED_UPS}
    axes.plot(
        [row.context for row in SPEED_UPS],
        [row.speed_up for row in SPEED_UPS],
        color=GRAY,
        marker="x",
        linestyle="--",
        label="the paper: Tables 1 and 5",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(figures.log_ticks())
    axes.yaxis.set_major_formatter("{x:g}")
    figures.finish(axes, sorted(lengths))
    return figure


def _speed_up_figure(rows: list[PrefillRow]) -> Any:
    figure, axes = new_figure("", "times as fast as dense attention")
    featured = sorted(
        _featured(rows),
        key=lambda bar: (bar[0].context, -(bar[0].block or 0), bar[0].kv_dtype or ""),
    )
    names = [
        f"{format_size(row.context)}\nblock {format_size(row.block or 0)}\n{row.kv_dtype or ''}"
        for row, _ in featured
    ]
    bars = axes.bar(names, [factor for _, factor in featured], color=figures.COLORS[0])
    axes.bar_label(bars, fmt="%.2f")
    axes.tick_params("x", labelsize=8)
    axes.axhline(1, color=GRAY, linewidth=1)
    return figure


def _featured(rows: list[PrefillRow]) -> list[tuple[PrefillRow, float]]:
    """Return the rows to feature, with their speed-ups over dense attention."""
    return [
        (row, factor)
        for row in rows
        if CONTENDERS[row.method].featured
        and (factor := speed_up(row, rows, "dense") or speed_up(row, rows, "stock"))
    ]


def _memory_figure(rows: list[PrefillRow]) -> Any:
    figure, axes = new_figure("context, tokens", "GiB beyond weights and KV")
    for label, group, color, marker in _styled_series(rows):
        points = [
            (row.context, row.working_bytes / 2**30)
            for row in group
            if row.working_bytes is not None
        ]
        lengths, gib = [length for length, _ in points], [size for _, size in points]
        axes.plot(lengths, gib, color=color, marker=marker, label=label)
    figures.finish(axes, sorted({row.context for row in rows}))
    axes.set_ylim(bottom=0)
    return figure


def _styled_series(
    rows: list[PrefillRow],
) -> Iterator[tuple[str, list[PrefillRow], str, str]]:
    """Each series with the color of its method and a marker for its settings."""
    settings_of: dict[str, int] = {}
    for label, group in series(rows):
        method = group[0].method
        index = settings_of[method] = settings_of.get(method, -1) + 1
        yield label, group, figures.color(_ORDER.index(method)), figures.marker(index)
