"""Heat maps: accuracy by depth of the needle and length."""

from __future__ import annotations

from typing import Any

from star_attention.evals.reports.plots.style import DARK_GRAY, SMALL
from star_attention.evals.reports.results import Results, variant_name
from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import heat_color, text_color

_MAX_DEPTHS = 12
"""With more depths, as where every sample has its own, they are drawn in tenths."""

Scores = dict[tuple[str, float, int], list[float]]
"""Scores by variant, depth in percent, and length."""


def by_depth(results: Results) -> Any:
    """Draw one panel for each variant; None if no sample has a depth (`meta["depth"]`, percent)."""
    scores = _scores(results)
    if not scores:
        return None
    from matplotlib.figure import Figure

    answered = {variant for variant, _, _ in scores}
    variants = [variant for variant in results.variants if variant in answered]
    depths, lengths = sorted({key[1] for key in scores}), sorted({key[2] for key in scores})
    columns = min(3, len(variants))
    rows = -(-len(variants) // columns)
    width = 1.2 + columns * (0.7 + max(1.9, 0.75 * len(lengths)))
    height = 0.6 + rows * (1.1 + 0.34 * len(depths))
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for index, axes in enumerate(panels.flat):
        if index < len(variants):
            _draw_panel(axes, scores, variants[index], depths, lengths)
        else:
            axes.set_visible(False)
    figure.supxlabel(
        f"length, tokens (accuracy in %, {_samples_per_cell(scores)} per cell)",
        fontsize=SMALL,
        color=DARK_GRAY,
    )
    figure.supylabel("depth of the needle", fontsize=SMALL, color=DARK_GRAY)
    return figure


def _scores(results: Results) -> Scores:
    with_depth = [
        (float(prediction.meta["depth"]), prediction)
        for prediction in results.predictions
        if isinstance(prediction.meta.get("depth"), (int, float))
    ]
    in_tenths = len({depth for depth, _ in with_depth}) > _MAX_DEPTHS
    scores: Scores = {}
    for depth, prediction in with_depth:
        row = round(depth, -1) if in_tenths else depth
        cell = (prediction.variant, row, prediction.length)
        scores.setdefault(cell, []).append(prediction.score)
    return scores


def _samples_per_cell(scores: Scores) -> str:
    """Format a count: `1 sample`, `5 samples`, `3 to 5 samples`."""
    counts = sorted({len(values) for values in scores.values()})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} sample{'' if counts == [1] else 's'}"


def _draw_panel(
    axes: Any, scores: Scores, variant: str, depths: list[float], lengths: list[int]
) -> None:
    from matplotlib.patches import Rectangle

    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            values = scores.get((variant, depth, length))
            if values is None:
                continue
            accuracy = sum(values) / len(values)
            corner = (column + 0.02, row + 0.03)
            axes.add_patch(
                Rectangle(corner, 0.96, 0.94, facecolor=heat_color(accuracy), linewidth=0)
            )
            axes.text(
                column + 0.5,
                row + 0.52,
                f"{100 * accuracy:.0f}",
                color=text_color(accuracy),
                ha="center",
                va="center",
                fontsize=8.5,
            )
    axes.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
    axes.set_xticks(
        [column + 0.5 for column in range(len(lengths))], [format_size(n) for n in lengths]
    )
    axes.set_yticks([row + 0.5 for row in range(len(depths))], [f"{depth:g} %" for depth in depths])
    axes.set_title(variant_name(variant), fontsize=10, fontweight="bold")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
