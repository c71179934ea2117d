"""Accuracy against block size or anchor size (figures 5a and 5b of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from star_attention.config import StarConfig
from star_attention.evals.reports.plots.style import (
    COLORS,
    accuracy_axis,
    add_legend,
    color_of,
    error_bar_caption,
    error_bars,
    percents,
    set_subtitle,
)
from star_attention.evals.reports.results import DENSE, Results, length_name, variant_name
from star_attention.evals.runs.variants import parse
from star_attention.evals.stats import Mean
from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import MARKERS, new_figure


@dataclass(frozen=True)
class _Line:
    """Variants that differ only in the size that is swept."""

    length: int
    fixed: str
    settings: tuple[str, ...]

    @property
    def order(self) -> tuple[int, str]:
        return self.length, str([self.fixed, self.settings])

    def label(self, *, with_length: bool) -> str:
        length = length_name(self.length) if self.length or with_length else ""
        parts = (StarConfig.method, length, self.fixed, *self.settings)
        return ", ".join(part for part in parts if part)


def sweep(results: Results, size: Literal["block", "anchor"]) -> Any:
    """Draw accuracy against one size, all else equal, a line for each length.

    Block sizes are compared with the anchor written in the same way, so that "as large as the
    block" is one line. Anchor sizes are compared at the same block size.

    Returns:
        None if no line has two sizes.
    """
    lines = _lines(results, size)
    if not lines:
        return None
    ticks = sorted({tick for means in lines.values() for tick in means})
    several_lengths = len({line.length for line in lines}) > 1
    colors: dict[int, str] = {}
    handles = []
    figure, axes = new_figure(f"{size} size, tokens", "accuracy, %")
    for index, line in enumerate(sorted(lines, key=lambda line: line.order)):
        color = COLORS[index % len(COLORS)]
        colors.setdefault(line.length, color)
        sizes = sorted(lines[line])
        means = [lines[line][tick] for tick in sizes]
        handle = axes.errorbar(
            [ticks.index(tick) for tick in sizes],
            percents(means),
            yerr=error_bars(means),
            capsize=3,
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            label=line.label(with_length=several_lengths),
        )
        handles.append(handle)
    handles += _dense_lines(axes, results, colors if several_lengths else dict.fromkeys(colors))
    axes.set_xticks(range(len(ticks)), [format_size(tick) for tick in ticks])
    all_means = [mean for means_by_size in lines.values() for mean in means_by_size.values()]
    set_subtitle(axes, error_bar_caption(all_means))
    accuracy_axis(axes)
    add_legend(axes, handles=handles)
    return figure


def _lines(results: Results, size: Literal["block", "anchor"]) -> dict[_Line, dict[int, Mean]]:
    """Return means by size, for every line of two sizes or more."""
    lines: dict[_Line, dict[int, Mean]] = {}
    for key in results.sweepable:
        variant = parse(key)
        for length in results.lengths:
            speed, comparison = results.speed(key, length), results.compared(key, length=length)
            if speed is None or comparison is None:
                continue
            if size == "block":
                fixed = "" if variant.anchor_size is None else f"anchor {variant.anchor_size}"
                tick = speed.block_size
            else:
                fixed = f"block {format_size(speed.block_size)}"
                tick = speed.anchor_size
            line = _Line(length, fixed, variant.settings)
            lines.setdefault(line, {})[tick] = comparison.mean
    return {line: means for line, means in lines.items() if len(means) > 1}


def _dense_lines(axes: Any, results: Results, colors: Mapping[int, str | None]) -> list[Any]:
    """Dense attention at each length, in its color; in black and without a length if that is None.

    Once for each length, however many lines it has.
    """
    handles = []
    for length, color in colors.items():
        dense = results.compared(DENSE, length=length) if DENSE in results.variants else None
        if dense is not None:
            name = variant_name(DENSE)
            handle = axes.axhline(
                100 * dense.mean.value,
                color=color or color_of(results, DENSE),
                linestyle="--",
                linewidth=1,
                label=f"{name}, {length_name(length)}" if color else name,
            )
            handles.append(handle)
    return handles
