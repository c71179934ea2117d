"""The pictures of a run: accuracy against length, block and anchor size, speed, by category, variant, and depth.

Colours are those of Okabe and Ito (2008), told apart by every common form of colour blindness; markers differ as well. Dense
attention is black and dashed in all of them (in the colours of the lengths where several have such a line).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.evals.reports.results import length_name
from star_attention.evals.runs.variants import parse
from star_attention.planning.plan import format_size
from star_attention.tools.plotting import heat_color, require_matplotlib, text_color

if TYPE_CHECKING:
    from star_attention.evals.reports.results import Results
    from star_attention.evals.reports.stats import Mean

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS = "osD^vP*Xhp"
_GREY = "#777777"
_MOST_DEPTHS = 12
_PLOT, _WIDEST, _CHARACTER = 5.6, 12.0, 0.085
"""Inches: a plot without its legend, at least and at most; and a character of a label."""


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """The pictures for which there is something to show, by name ("length", "groups", "variants", "blocks", "anchors", "depth",
    "speed").

    Raises `MissingPackageError` without matplotlib.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "length": _length(results) if sum(map(bool, results.lengths)) > 1 else None,
        "groups": _groups(results) if len(results.groups) > 1 else None,
        "variants": _variants(results)
        if any(parse(variant).ablates for variant in results.variants)
        else None,
        "blocks": _sweep(results, "block"),
        "anchors": _sweep(results, "anchor"),
        "depth": _depth(results),
        "speed": _speed(results) if any(map(results.is_timed, results.variants)) else None,
    }
    made = {}
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, dpi=150, facecolor="white")
            made[name] = path
    return made


def _length(results: Results) -> Any:
    """Overall accuracy against length, with bars of two standard errors to each side."""
    drawn: list[Mean] = []
    figure, axes = _figure("length, tokens", "accuracy, %")
    lengths = [length for length in results.lengths if length]
    middle = (len(results.variants) - 1) / 2  # (side by side, so that bars do not hide one another)
    for place, variant in enumerate(results.variants):
        found = [(length, results.compared(variant, length=length)) for length in lengths]
        some = [(length, one.mean) for length, one in found if one is not None]
        drawn += [mean for _, mean in some]
        axes.errorbar(
            [lengths.index(length) + 0.03 * (place - middle) for length, _ in some],
            [100 * mean.value for _, mean in some],
            yerr=_bars([mean for _, mean in some]),
            capsize=3,
            label=results.name(variant),
            **_look(results, variant),
        )
    axes.set_xticks(range(len(lengths)), [format_size(length) for length in lengths])
    _accuracy_axis(axes)
    _legend(axes)
    told = _bars_told(drawn)
    _subtitle(axes, f"mean over tasks; {told}" if told else "mean over tasks")
    return figure


def _groups(results: Results) -> Any:
    """Bars of each category, one panel a length."""
    from matplotlib.figure import Figure

    lengths, groups = results.lengths, results.groups
    longest = _CHARACTER * max(map(len, groups))
    each = max(
        0.35, _PLOT / len(groups), min(0.14 * len(results.variants) + 0.1, _WIDEST / len(groups))
    )
    slanted = longest > each
    figure = Figure(
        figsize=(9, 0.8 + (longest / 2 if slanted else 0.0) + 2.3 * len(lengths)),
        layout="constrained",
    )
    panels = figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0]
    width = 0.8 / len(results.variants)
    drawn: list[Mean] = []
    for axes, length in zip(panels, lengths, strict=True):
        for index, variant in enumerate(results.variants):
            places, means = [], []
            for place, group in enumerate(groups):
                found = results.compared(variant, group=group, length=length)
                across = place + (index + 0.5) * width - 0.4
                if found is None:
                    axes.text(across, 1, "–", ha="center", color=_GREY)
                    continue
                places.append(across)
                means.append(found.mean)
            drawn += means
            axes.bar(
                places,
                [100 * mean.value for mean in means],
                width * 0.9,
                yerr=_bars(means),
                color=_colour(results, variant),
                hatch="//" if _place(results, variant) >= len(_COLOURS) else None,
                edgecolor="white",
                linewidth=0,
                error_kw={"ecolor": _GREY, "capsize": 2, "linewidth": 1},
                label=results.name(variant),
            )
        axes.set_title(length_name(length), fontsize=10, loc="left")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 105)
        _plain(axes)
        axes.grid(visible=False, axis="x")
        axes.tick_params("x", length=0)
        axes.margins(x=0.02)
    turned = {"rotation": 30, "rotation_mode": "anchor", "ha": "right"} if slanted else {}
    panels[-1].set_xticks(range(len(groups)), groups, **turned)
    if told := _bars_told(drawn):
        figure.supxlabel(f"grey {told}", fontsize=9, color="#444444")
    _legend(panels[0], plot=each * len(groups))
    return figure


def _variants(results: Results) -> Any:
    """Bars of each variant's overall accuracy, dense attention as a line; None where no task and length has all variants.

    (For ablations, which differ in more than a size that an axis could have.)
    """
    means = {
        key: found.mean for key in results.variants if (found := results.compared(key)) is not None
    }
    dense = means.pop("dense", None)
    if not means:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.36 * len(means)), layout="constrained")
    axes = figure.subplots()
    places, values = range(len(means)), [100 * mean.value for mean in means.values()]
    axes.barh(
        places,
        values,
        0.7,
        xerr=_bars(list(means.values())),
        color=_COLOURS[0],
        error_kw={"ecolor": _GREY, "capsize": 2, "linewidth": 1},
    )
    for place, value in zip(places, values, strict=True):
        axes.text(
            1.01,
            place,
            f"{value:.1f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
        )
    if dense is not None:
        axes.axvline(
            100 * dense.value, color=_colour(results, "dense"), linestyle="--", linewidth=1
        )
    axes.set_yticks(places, list(map(results.name, means)))
    axes.set(xlabel="accuracy, %, mean over tasks and lengths", xlim=(0, 105))
    axes.invert_yaxis()
    _plain(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params("y", length=0)
    told = [] if dense is None else [f"dashed: dense, {100 * dense.value:.1f}"]
    told += [f"grey {bars}"] if (bars := _bars_told(means.values())) else []
    figure.supxlabel("; ".join(told), fontsize=9, color="#444444")
    return figure


def _sweep(results: Results, what: str) -> Any:
    """Accuracy against block size or anchor size, all else equal, a line for each length; None without two sizes.

    (Blocks are compared with the anchor written in the same way, so that "as large as the block" is one line: Figure 5a of the
    paper. Anchors are compared behind the same block: Figure 5b.)
    """
    lines: dict[tuple[Any, ...], dict[int, Mean]] = {}
    for key, variant in results.star_variants():
        for length in results.lengths:
            speed, found = results.speed(key, length), results.compared(key, length=length)
            if speed is None or found is None:
                continue
            if what == "block":
                line = (
                    length,
                    "" if variant.anchor_size is None else f"anchor {variant.anchor_size}",
                    variant.kv_dtype,
                )
                size = speed.block_size
            else:
                line = (length, f"block {format_size(speed.block_size)}", variant.kv_dtype)
                size = speed.anchor_size
            lines.setdefault(line, {})[size] = found.mean
    lines = {line: values for line, values in lines.items() if len(values) > 1}
    if not lines:
        return None
    sizes = sorted({size for values in lines.values() for size in values})
    several = len({length for length, *_ in lines}) > 1
    shades: dict[int, str] = {}
    handles = []
    figure, axes = _figure(f"{what} size, tokens", "accuracy, %")
    for index, ((length, fixed, kv), values) in enumerate(sorted(lines.items(), key=_by_length)):
        shade, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        shades.setdefault(length, shade)
        at = length_name(length) if length or several else ""
        means = [values[size] for size in sorted(values)]
        line = axes.errorbar(
            [sizes.index(size) for size in sorted(values)],
            [100 * mean.value for mean in means],
            yerr=_bars(means),
            capsize=3,
            color=shade,
            marker=marker,
            label=", ".join(part for part in ("star", at, fixed, kv) if part),
        )
        handles.append(line)
    for length, shade in shades.items():  # (once, however many lines a length has)
        dense = results.compared("dense", length=length) if "dense" in results.variants else None
        if dense is not None:
            shade = shade if several else _colour(results, "dense")
            name = f"dense, {length_name(length)}" if several else "dense"
            level = 100 * dense.mean.value
            handles.append(
                axes.axhline(level, color=shade, linestyle="--", linewidth=1, label=name)
            )
    axes.set_xticks(range(len(sizes)), [format_size(size) for size in sizes])
    _subtitle(axes, _bars_told(mean for values in lines.values() for mean in values.values()))
    _accuracy_axis(axes)
    _legend(axes, handles=handles)
    return figure


def _bars(means: Sequence[Mean]) -> list[list[float]] | None:
    """Two standard errors below and above each mean, in percent, as far as 0 and 100; NaN draws no bar where there is no error, and
    None none at all.
    """
    if all(mean.stderr is None for mean in means):
        return None
    errors = [math.nan if mean.stderr is None else 200 * mean.stderr for mean in means]
    values = [100 * mean.value for mean in means]
    below = [min(error, value) for error, value in zip(errors, values, strict=True)]
    return [below, [min(error, 100 - value) for error, value in zip(errors, values, strict=True)]]


def _bars_told(means: Iterable[Mean]) -> str:
    """What bars of errors mean, where there are any."""
    return "bars: ± two standard errors" if any(mean.stderr is not None for mean in means) else ""


def _by_length(line: tuple[tuple[Any, ...], Any]) -> tuple[int, str]:
    (length, *others), _ = line
    return length, str(others)


def _depth(results: Results) -> Any:
    """Accuracy by depth of the needle (`meta["depth"]`, percent) and length, one panel a variant; None where no sample has one.

    (Many depths, as where each sample has its own, are drawn by tenths.)
    """
    distinct = {
        one.meta.get("depth")
        for one in results.predictions
        if isinstance(one.meta.get("depth"), (int, float))
    }
    by_tenths = len(distinct) > _MOST_DEPTHS
    found: dict[tuple[str, float, int], list[float]] = {}
    for prediction in results.predictions:
        depth = prediction.meta.get("depth")
        if isinstance(depth, (int, float)):
            row = float(round(depth, -1) if by_tenths else depth)
            cell = (prediction.variant, row, prediction.length)
            found.setdefault(cell, []).append(prediction.score)
    if not found:
        return None
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    variants = [variant for variant in results.variants if any(key[0] == variant for key in found)]
    depths, lengths = sorted({key[1] for key in found}), sorted({key[2] for key in found})
    across = min(3, len(variants))
    down = -(-len(variants) // across)
    size = (
        1.2 + across * (0.7 + max(1.9, 0.75 * len(lengths))),
        0.6 + down * (1.1 + 0.34 * len(depths)),
    )
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for index, axes in enumerate(panels.flat):
        if index >= len(variants):
            axes.set_visible(False)
            continue
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                scores = found.get((variants[index], depth, length))
                if scores is None:
                    continue
                part = sum(scores) / len(scores)
                axes.add_patch(
                    Rectangle(
                        (column + 0.02, row + 0.03),
                        0.96,
                        0.94,
                        facecolor=heat_color(part),
                        linewidth=0,
                    )
                )
                place = (column + 0.5, row + 0.52)
                axes.text(
                    *place,
                    f"{100 * part:.0f}",
                    color=text_color(part),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                )
        axes.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
        axes.set_xticks(
            [one + 0.5 for one in range(len(lengths))], [format_size(length) for length in lengths]
        )
        axes.set_yticks(
            [one + 0.5 for one in range(len(depths))], [f"{depth:g} %" for depth in depths]
        )
        axes.set_title(results.name(variants[index]), fontsize=10, fontweight="bold")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    counts = sorted({len(scores) for scores in found.values()})
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    figure.supxlabel(
        f"length, tokens (accuracy in %, {each} sample{'' if counts == [1] else 's'} a cell)",
        fontsize=9,
        color="#444444",
    )
    figure.supylabel("depth of the needle", fontsize=9, color="#444444")
    return figure


def _speed(results: Results) -> Any:
    """Accuracy against the time of a question, a point for each length."""
    figure, axes = _figure("seconds a question, with its share of the encoding", "accuracy, %")
    for place, variant in enumerate(filter(results.is_timed, results.variants)):
        points = []
        for length in results.lengths:
            speed, found = results.speed(variant, length), results.compared(variant, length=length)
            if speed is not None and found is not None:
                points.append((speed.question_s, 100 * found.mean.value, length))
        look = _look(results, variant) | {"linewidth": 0.8}
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            label=results.name(variant),
            **look,
        )
        for x, y, length in (*points[:1], *points[1:][-1:]):
            if length:
                axes.annotate(
                    format_size(length),
                    (x, y),
                    xytext=(0, (6, -12)[place % 2]),
                    textcoords="offset points",
                    fontsize=7,
                    ha="center",
                )
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(_ticks(*axes.get_xlim()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    _accuracy_axis(axes)
    _legend(axes)
    return figure


def _ticks(low: float, high: float) -> Any:
    """Of a logarithmic axis: 1, 2 and 5 in every decade; even steps where it is too short for three of these."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    return (
        LogLocator(base=10, subs=(1, 2, 5))
        if high > 10 * low
        else MaxNLocator(nbins=8, steps=[1, 2, 5, 10])
    )


def _colour(results: Results, variant: str) -> str:
    if variant == "dense":
        return "#000000"
    return _COLOURS[_place(results, variant) % len(_COLOURS)]


def _place(results: Results, variant: str) -> int:
    """Among the variants that have colours; 0 for dense."""
    return (
        0
        if variant == "dense"
        else [one for one in results.variants if one != "dense"].index(variant)
    )


def _look(results: Results, variant: str) -> dict[str, Any]:
    """Colour, marker and line of a variant, the same in all pictures."""
    return {
        "color": _colour(results, variant),
        "marker": _MARKERS[results.variants.index(variant) % len(_MARKERS)],
        "linestyle": "--" if variant == "dense" else "-",
    }


def _figure(across: str, up: str) -> tuple[Any, Any]:
    # Figure and not pyplot: no global state, no windows, whatever backend is configured.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _accuracy_axis(axes: Any) -> None:
    axes.set_ylim(-3, 108)
    axes.set_yticks(range(0, 101, 20))


def _subtitle(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=9, color="#444444", loc="left")


def _legend(axes: Any, *, handles: list[Any] | None = None, plot: float = _PLOT) -> None:
    """On the right, for which the figure is made wider where long names would leave less than `plot` inches."""
    known = axes.get_legend_handles_labels()[0] if handles is None else handles
    legend = axes.legend(handles=known, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    wide = legend.get_window_extent().width / axes.figure.dpi
    axes.figure.set_figwidth(max(axes.figure.get_figwidth(), plot + wide + 0.6))
