"""Bars: the accuracy of each category, and of each variant."""

from __future__ import annotations

from typing import Any

from star_attention.evals.reports.plots.style import (
    COLORS,
    DARK_GRAY,
    ERROR_BARS,
    MAX_PLOT_WIDTH,
    PLOT_WIDTH,
    SMALL,
    add_legend,
    color_index,
    color_of,
    error_bar_caption,
    error_bars,
    percents,
)
from star_attention.evals.reports.results import DENSE, Results, length_name, variant_name
from star_attention.evals.stats import Mean
from star_attention.tools.plotting import GRAY, plain_axes

_CHARACTER_WIDTH = 0.085
"""Inches of a character of a label."""


def by_group(results: Results) -> Any:
    """Draw bars of each category, one panel for each length."""
    from matplotlib.figure import Figure

    lengths, groups = results.lengths, results.groups
    label_width = _CHARACTER_WIDTH * max(map(len, groups))
    group_width = _group_width(results)
    is_slanted = label_width > group_width
    figure = Figure(
        figsize=(9, 0.8 + (label_width / 2 if is_slanted else 0.0) + 2.3 * len(lengths)),
        layout="constrained",
    )
    panels = figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0]
    drawn: list[Mean] = []
    for axes, length in zip(panels, lengths, strict=True):
        drawn += _draw_groups(axes, results, length)
    rotation: dict[str, Any] = {}
    if is_slanted:
        rotation = {"rotation": 30, "rotation_mode": "anchor", "ha": "right"}
    panels[-1].set_xticks(range(len(groups)), groups, **rotation)
    if caption := error_bar_caption(drawn):
        figure.supxlabel(f"gray {caption}", fontsize=SMALL, color=DARK_GRAY)
    add_legend(panels[0], plot=group_width * len(groups))
    return figure


def _group_width(results: Results) -> float:
    """Return the inches for the bars of one category."""
    count = len(results.groups)
    panel_width = 0.14 * len(results.variants) + 0.1
    return max(0.35, PLOT_WIDTH / count, min(panel_width, MAX_PLOT_WIDTH / count))


def _draw_groups(axes: Any, results: Results, length: int) -> list[Mean]:
    """Draw one panel and return the means in it."""
    drawn: list[Mean] = []
    width = 0.8 / len(results.variants)
    for index, variant in enumerate(results.variants):
        places, means = [], []
        for place, group in enumerate(results.groups):
            comparison = results.compared(variant, group=group, length=length)
            x = place + (index + 0.5) * width - 0.4
            if comparison is None:
                axes.text(x, 1, "–", ha="center", color=GRAY)
                continue
            places.append(x)
            means.append(comparison.mean)
        drawn += means
        axes.bar(
            places,
            percents(means),
            width * 0.9,
            yerr=error_bars(means),
            color=color_of(results, variant),
            hatch="//" if color_index(results, variant) >= len(COLORS) else None,
            edgecolor="white",
            linewidth=0,
            error_kw=ERROR_BARS,
            label=variant_name(variant),
        )
    axes.set_title(length_name(length), fontsize=10, loc="left")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 105)
    plain_axes(axes)
    axes.grid(visible=False, axis="x")
    axes.tick_params("x", length=0)
    axes.margins(x=0.02)
    return drawn


def by_variant(results: Results) -> Any:
    """Draw bars of each variant's overall accuracy, dense attention as a line.

    For ablations, which differ in more than a size that an axis could show.

    Returns:
        None if no task and length has all variants.
    """
    from matplotlib.figure import Figure

    means: dict[str, Mean] = {}
    for key in results.variants:
        comparison = results.compared(key)
        if comparison is not None:
            means[key] = comparison.mean
    dense = means.pop(DENSE, None)
    if not means:
        return None
    figure = Figure(figsize=(9, 0.9 + 0.36 * len(means)), layout="constrained")
    axes = figure.subplots()
    places, values = range(len(means)), percents(means.values())
    axes.barh(
        places,
        values,
        0.7,
        xerr=error_bars(list(means.values())),
        color=COLORS[0],
        error_kw=ERROR_BARS,
    )
    for place, value in zip(places, values, strict=True):
        transform = axes.get_yaxis_transform()
        axes.text(1.01, place, f"{value:.1f}", transform=transform, va="center", fontsize=SMALL)
    captions = []
    if dense is not None:
        level = 100 * dense.value
        axes.axvline(level, color=color_of(results, DENSE), linestyle="--", linewidth=1)
        captions.append(f"dashed: {variant_name(DENSE)}, {level:.1f}")
    if caption := error_bar_caption(means.values()):
        captions.append(f"gray {caption}")
    axes.set_yticks(places, list(map(variant_name, means)))
    axes.set(xlabel="accuracy, %, mean over tasks and lengths", xlim=(0, 105))
    axes.invert_yaxis()
    plain_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params("y", length=0)
    figure.supxlabel("; ".join(captions), fontsize=SMALL, color=DARK_GRAY)
    return figure
