"""The look that all figures of a run share.

Dense attention is black and dashed, or in the colors of the lengths if several have such a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from star_attention.evals.reports.results import DENSE, Results
from star_attention.evals.stats import Mean
from star_attention.tools.plotting import BLACK, GRAY, MARKERS, PALETTE

COLORS = (*PALETTE, "#999999")
DARK_GRAY = "#444444"
SMALL = 9
"""Font size of captions."""
ERROR_BARS: dict[str, Any] = {"ecolor": GRAY, "capsize": 2, "linewidth": 1}

PLOT_WIDTH, MAX_PLOT_WIDTH = 5.6, 12.0
"""Inches of a plot without its legend, at least and at most."""


def color_of(results: Results, variant: str) -> str:
    """Return the color of a variant, the same in all figures."""
    if variant == DENSE:
        return BLACK
    return COLORS[color_index(results, variant) % len(COLORS)]


def color_index(results: Results, variant: str) -> int:
    """Return the place among the variants that have a color; 0 for dense attention."""
    if variant == DENSE:
        return 0
    return [key for key in results.variants if key != DENSE].index(variant)


def line_style(results: Results, variant: str) -> dict[str, Any]:
    """Return color, marker and line of a variant, the same in all figures."""
    return {
        "color": color_of(results, variant),
        "marker": MARKERS[results.variants.index(variant) % len(MARKERS)],
        "linestyle": "--" if variant == DENSE else "-",
    }


def accuracy_axis(axes: Any) -> None:
    axes.set_ylim(-3, 108)
    axes.set_yticks(range(0, 101, 20))


def set_subtitle(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=SMALL, color=DARK_GRAY, loc="left")


def add_legend(axes: Any, *, handles: list[Any] | None = None, plot: float = PLOT_WIDTH) -> None:
    """Add a legend on the right, and widen the figure if that leaves less than `plot` inches."""
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    legend = axes.legend(
        handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    width = legend.get_window_extent().width / axes.figure.dpi
    axes.figure.set_figwidth(max(axes.figure.get_figwidth(), plot + width + 0.6))


def percents(means: Iterable[Mean]) -> list[float]:
    return [100 * mean.value for mean in means]


def error_bars(means: Sequence[Mean]) -> list[list[float]] | None:
    """Two standard errors below and above each mean, in percent, clipped to 0 and 100.

    Returns:
        NaN, which draws no bar, for a mean without an error; None if none has one.
    """
    if all(mean.stderr is None for mean in means):
        return None
    errors = [math.nan if mean.stderr is None else 200 * mean.stderr for mean in means]
    values = percents(means)
    below = [min(error, value) for error, value in zip(errors, values, strict=True)]
    above = [min(error, 100 - value) for error, value in zip(errors, values, strict=True)]
    return [below, above]


def error_bar_caption(means: Iterable[Mean]) -> str:
    """Return the caption of the error bars; "" if there are none."""
    return "bars: ± two standard errors" if any(mean.stderr is not None for mean in means) else ""
