"""The pictures of a run: accuracy against length, block and anchor size, speed, by category, and by depth.

Colours are those of Okabe and Ito (2008), told apart by every common form of colour blindness; markers differ as well. Dense
attention is black and dashed in all of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.demo.heatmap import colour, ink, require_matplotlib
from star_attention.plan import format_size

if TYPE_CHECKING:
    from star_attention.evals.results import Results
    from star_attention.evals.stats import Mean

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS = "osD^vP*Xhp"
_GREY = "#777777"
_MOST_DEPTHS = 12


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """The pictures for which there is something to show, by name ("length", "groups", "blocks", "anchors", "depth", "speed").

    Raises `MissingPackageError` without matplotlib.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "length": _length(results) if sum(map(bool, results.lengths)) > 1 else None,
        "groups": _groups(results) if len(results.groups) > 1 else None,
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
    figure, axes = _figure("length, tokens", "accuracy, %")
    lengths = [length for length in results.lengths if length]
    middle = (len(results.variants) - 1) / 2  # (side by side, so that bars do not hide one another)
    for place, variant in enumerate(results.variants):
        found = [(length, results.compared(variant, length=length)) for length in lengths]
        some = [(length, one.mean) for length, one in found if one is not None]
        axes.errorbar(
            [lengths.index(length) + 0.03 * (place - middle) for length, _ in some],
            [100 * mean.value for _, mean in some],
            yerr=[_bar(mean) for _, mean in some],
            capsize=3,
            label=results.name(variant),
            **_look(results, variant),
        )
    axes.set_xticks(range(len(lengths)), [format_size(length) for length in lengths])
    _accuracy_axis(axes)
    _legend(axes)
    axes.set_title("mean over tasks; bars: ± two standard errors", fontsize=9, color="#444444", loc="left")
    return figure


def _groups(results: Results) -> Any:
    """Bars of each category, one panel a length."""
    from matplotlib.figure import Figure

    lengths = results.lengths
    figure = Figure(figsize=(9, 0.8 + 2.3 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0]
    width = 0.8 / len(results.variants)
    for axes, length in zip(panels, lengths, strict=True):
        for index, variant in enumerate(results.variants):
            places, heights, errors = [], [], []
            for place, group in enumerate(results.groups):
                found = results.compared(variant, group=group, length=length)
                across = place + (index + 0.5) * width - 0.4
                if found is None:
                    axes.text(across, 1, "–", ha="center", color=_GREY)
                    continue
                places.append(across)
                heights.append(100 * found.mean.value)
                errors.append(_bar(found.mean))
            axes.bar(
                places,
                heights,
                width * 0.9,
                yerr=errors,
                color=_colour(results, variant),
                hatch="//" if _place(results, variant) >= len(_COLOURS) else None,
                edgecolor="white",
                linewidth=0,
                error_kw={"ecolor": _GREY, "capsize": 2, "linewidth": 1},
                label=results.name(variant),
            )
        axes.set_title(format_size(length) if length else "as given", fontsize=10, loc="left")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 105)
        _plain(axes)
        axes.grid(visible=False, axis="x")
    panels[-1].set_xticks(range(len(results.groups)), results.groups)
    panels[-1].tick_params("x", length=0)
    _legend(panels[0])
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
    figure, axes = _figure(f"{what} size, tokens", "accuracy, %")
    for index, ((length, fixed, kv), values) in enumerate(sorted(lines.items(), key=_by_length)):
        shade, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        name = ", ".join(part for part in (format_size(length) if length else "", fixed, kv) if part)
        places = [sizes.index(size) for size in sorted(values)]
        axes.errorbar(
            places,
            [100 * values[size].value for size in sorted(values)],
            yerr=[_bar(values[size]) for size in sorted(values)],
            capsize=3,
            color=shade,
            marker=marker,
            label=name,
        )
        dense = results.compared("dense", length=length) if "dense" in results.variants else None
        if dense is not None:
            axes.axhline(100 * dense.mean.value, color=shade, linestyle="--", linewidth=1)
    if "dense" in results.variants:
        axes.plot([], [], "--", color=_GREY, linewidth=1, label="dense, same length")
    axes.set_xticks(range(len(sizes)), [format_size(size) for size in sizes])
    axes.set_title("bars: ± two standard errors", fontsize=9, color="#444444", loc="left")
    _accuracy_axis(axes)
    _legend(axes)
    return figure


def _bar(mean: Mean) -> float:
    """Two standard errors in percent; NaN, which draws no bar, where there is no error."""
    return math.nan if mean.stderr is None else 200 * mean.stderr


def _by_length(line: tuple[tuple[Any, ...], Any]) -> tuple[int, str]:
    (length, *others), _ = line
    return length, str(others)


def _depth(results: Results) -> Any:
    """Accuracy by depth of the needle (`meta["depth"]`, percent) and length, one panel a variant; None where no sample has one.

    (Many depths, as where each sample has its own, are drawn by tenths.)
    """
    distinct = {one.meta.get("depth") for one in results.predictions if isinstance(one.meta.get("depth"), (int, float))}
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
    size = (1.2 + across * (0.7 + max(1.9, 0.75 * len(lengths))), 0.6 + down * (1.1 + 0.34 * len(depths)))
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
                axes.add_patch(Rectangle((column + 0.02, row + 0.03), 0.96, 0.94, facecolor=colour(part), linewidth=0))
                place = (column + 0.5, row + 0.52)
                axes.text(*place, f"{100 * part:.0f}", color=ink(part), ha="center", va="center", fontsize=8.5)
        axes.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
        axes.set_xticks([one + 0.5 for one in range(len(lengths))], [format_size(length) for length in lengths])
        axes.set_yticks([one + 0.5 for one in range(len(depths))], [f"{depth:g} %" for depth in depths])
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
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=results.name(variant), **look)
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
    axes.xaxis.set_major_locator(_log_ticks())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.margins(x=0.1)
    _accuracy_axis(axes)
    _legend(axes)
    return figure


def _log_ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))


def _colour(results: Results, variant: str) -> str:
    if variant == "dense":
        return "#000000"
    return _COLOURS[_place(results, variant) % len(_COLOURS)]


def _place(results: Results, variant: str) -> int:
    """Among the variants that have colours; 0 for dense."""
    return 0 if variant == "dense" else [one for one in results.variants if one != "dense"].index(variant)


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


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
