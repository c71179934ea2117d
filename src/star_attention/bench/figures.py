"""Common parts of the benchmarks' pictures: colors, floors, the axis of lengths, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import BLACK, MARKERS, PALETTE

COLORS = (*PALETTE, BLACK)


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def floor_style(lengths: list[int], linestyle: str) -> dict[str, Any]:
    """Return the style of a floor: a line, or a dash at a single length, which has no line."""
    if len(set(lengths)) > 1:
        return {"linestyle": linestyle}
    return {"linestyle": "", "marker": "_", "markersize": 14}


def finish(axes: Any, lengths: list[int]) -> None:
    """Scale and label the axis of lengths, and add the legend."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_size(length) for length in lengths])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def finish_ranks(axes: Any, numbers: list[int]) -> None:
    """Scale and label the axis of numbers of ranks, and add the legend."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def log_ticks() -> Any:
    """Return a locator of ticks at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
