"""Accuracy against length, and against time."""

from __future__ import annotations

from typing import Any

from star_attention.evals.reports.plots.style import (
    accuracy_axis,
    add_legend,
    error_bar_caption,
    error_bars,
    line_style,
    percents,
    set_subtitle,
)
from star_attention.evals.reports.results import Results, is_timed, variant_name
from star_attention.evals.stats import Mean
from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import new_figure

_OFFSET = 0.03
"""Variants are drawn side by side, so that their error bars do not hide one another."""


def by_length(results: Results) -> Any:
    """Draw overall accuracy against length, with error bars."""
    figure, axes = new_figure("length, tokens", "accuracy, %")
    lengths = [length for length in results.lengths if length]
    center = (len(results.variants) - 1) / 2
    drawn: list[Mean] = []
    for index, variant in enumerate(results.variants):
        places, means = [], []
        for place, length in enumerate(lengths):
            comparison = results.compared(variant, length=length)
            if comparison is not None:
                places.append(place + _OFFSET * (index - center))
                means.append(comparison.mean)
        drawn += means
        axes.errorbar(
            places,
            percents(means),
            yerr=error_bars(means),
            capsize=3,
            label=variant_name(variant),
            **line_style(results, variant),
        )
    axes.set_xticks(range(len(lengths)), [format_size(length) for length in lengths])
    accuracy_axis(axes)
    add_legend(axes)
    caption = error_bar_caption(drawn)
    set_subtitle(axes, f"mean over tasks; {caption}" if caption else "mean over tasks")
    return figure


def by_speed(results: Results) -> Any:
    """Draw accuracy against the time of a question, a point for each length."""
    figure, axes = new_figure(
        "seconds per question, including its share of the encoding", "accuracy, %"
    )
    for index, variant in enumerate(filter(is_timed, results.variants)):
        points = _points(results, variant)
        axes.plot(
            [seconds for seconds, _, _ in points],
            [accuracy for _, accuracy, _ in points],
            label=variant_name(variant),
            **line_style(results, variant) | {"linewidth": 0.8},
        )
        # The lengths of the first and the last point.
        for seconds, accuracy, length in (*points[:1], *points[1:][-1:]):
            if length:
                axes.annotate(
                    format_size(length),
                    (seconds, accuracy),
                    xytext=(0, (6, -12)[index % 2]),
                    textcoords="offset points",
                    fontsize=7,
                    ha="center",
                )
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(_time_ticks(*axes.get_xlim()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    accuracy_axis(axes)
    add_legend(axes)
    return figure


def _points(results: Results, variant: str) -> list[tuple[float, float, int]]:
    """Return seconds, accuracy in percent, and length."""
    points = []
    for length in results.lengths:
        speed = results.speed(variant, length)
        comparison = results.compared(variant, length=length)
        if speed is not None and comparison is not None:
            points.append((speed.question_s, 100 * comparison.mean.value, length))
    return points


def _time_ticks(low: float, high: float) -> Any:
    """1, 2 and 5 in every decade; even steps if the axis is too short for three of these."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if high > 10 * low:
        return LogLocator(base=10, subs=(1, 2, 5))
    return MaxNLocator(nbins=8, steps=[1, 2, 5, 10])
