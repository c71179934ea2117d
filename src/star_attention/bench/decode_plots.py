"""The pictures of `bench decode`: time per token by length, and by number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from star_attention.bench import figures
from star_attention.bench.decode_rows import DecodeRow, series
from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import GRAY, new_figure


def draw(rows: list[DecodeRow], folder: Path) -> list[Path]:
    """Draw milliseconds per token into an existing folder; return the files written."""
    files = [figures.save(token_figure(rows), folder / "decode.png")]
    if len({row.ranks for row in rows if row.token_s is not None}) > 1:
        files.append(figures.save(ranks_figure(rows), folder / "decode-ranks.png"))
    return files


def token_figure(rows: list[DecodeRow]) -> Any:
    """Draw milliseconds per token by length, with the time that reading the bytes once takes."""
    figure, axes = new_figure("context, tokens", "ms per token")
    lengths = sorted({row.context for row in rows})
    style = figures.floor_style(lengths, "--")
    for index, (label, group) in enumerate(series(rows)):
        points = [row.context for row in group]
        color = figures.color(index)
        axes.plot(
            points,
            [(row.token_s or 0.0) * 1e3 for row in group],
            color=color,
            marker=figures.marker(index),
            label=f"{label}, CUDA graphs" if group[0].compiled else label,
        )
        floors = [row.floor_s * 1e3 for row in group]
        axes.plot(points, floors, color=color, linewidth=1, **style)
    axes.plot([], [], color=GRAY, label="floor: bytes at the copy's rate", **style)
    figures.finish(axes, lengths)
    axes.set_ylim(bottom=0)
    return figure


def ranks_figure(rows: list[DecodeRow]) -> Any:
    """Draw the fastest milliseconds per token by number of ranks, a line for each length."""
    figure, axes = new_figure("ranks", "ms per token")
    numbers = sorted({row.ranks for row in rows})
    for index, context in enumerate(sorted({row.context for row in rows})):
        best = [
            min(group, key=lambda row: row.token_s or 0.0)
            for number in numbers
            if (
                group := [
                    row
                    for row in rows
                    if (row.context, row.ranks) == (context, number) and row.token_s is not None
                ]
            )
        ]
        color, points = figures.color(index), [row.ranks for row in best]
        axes.plot(
            points,
            [(row.token_s or 0.0) * 1e3 for row in best],
            color=color,
            marker=figures.marker(index),
            label=format_size(context),
        )
        style = figures.floor_style(numbers, "--")
        axes.plot(points, [row.floor_s * 1e3 for row in best], color=color, linewidth=1, **style)
    axes.plot([], [], color=GRAY, label="floor: bytes at the copy's rate", linestyle="--")
    figures.finish_ranks(axes, numbers)
    axes.set_ylim(bottom=0)
    return figure
