"""The heat map over depth and length, as a PNG (matplotlib) and as SVG for the page; one palette for both."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from star_attention.demo.result import DENSE, STAR, DemoResult, band_name
from star_attention.planning.plan import format_size
from star_attention.tools.plotting import heat_color, require_matplotlib, text_color

_TITLE_WIDTH = 2.5
"""Inches of a panel that its title fits into."""

PANELS = ((DENSE, "Dense attention"), (STAR, "Star Attention"))


def cells(result: DemoResult, mode: str) -> list[tuple[int, int, float]]:
    """`(row, column, accuracy)`; rows are tenths of the text from its beginning, columns lengths from the shortest."""
    return [
        (row, column, result.score(mode, length, tenth).accuracy)
        for row, tenth in enumerate(result.bands)
        for column, length in enumerate(result.lengths)
    ]


def write_png(result: DemoResult, path: Path, caption: str) -> None:
    """Both panels, with the caption underneath. Raises `MissingPackageError` and `OSError`."""
    drawn(result, caption).savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.2)


def drawn(result: DemoResult, caption: str) -> Any:
    """The same as a figure."""
    require_matplotlib()
    # Figure and not pyplot: no global state, no windows, whatever backend is configured.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lengths, bands = result.lengths, result.bands
    panel = max(0.9 + 0.75 * len(lengths), _TITLE_WIDTH)
    figure = Figure(
        figsize=(2.6 + 2 * panel, 1.9 + 0.36 * len(bands)), dpi=160, layout="constrained"
    )
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (mode, title) in zip(axes, PANELS, strict=True):
        for row, column, accuracy in cells(result, mode):
            axis.add_patch(
                Rectangle(
                    (column + 0.02, row + 0.03),
                    0.96,
                    0.94,
                    facecolor=heat_color(accuracy),
                    linewidth=0,
                )
            )
            axis.text(
                column + 0.5,
                row + 0.52,
                f"{accuracy:.0%}",
                color=text_color(accuracy),
                ha="center",
                va="center",
                fontsize=8.5,
            )
        axis.set(xlim=(0, len(lengths)), ylim=(len(bands), 0), xlabel="context length, tokens")
        axis.set_xticks(
            [one + 0.5 for one in range(len(lengths))], [format_size(length) for length in lengths]
        )
        axis.set_yticks(
            [one + 0.5 for one in range(len(bands))], [band_name(tenth) for tenth in bands]
        )
        axis.set_title(
            f"{title}: {result.score(mode)} found", fontsize=11, fontweight="bold", pad=8
        )
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("depth of the fact in the text")
    figure.supxlabel(caption, fontsize=8.5, color="#444444")
    return figure


def svg(result: DemoResult, mode: str, title: str) -> str:
    """One panel; its text takes the page's colours (`currentColor`)."""
    lengths, bands = result.lengths, result.bands
    width, height, left, top = max(74, 300 // len(lengths)), 30, 84, 40  # wide enough for the title
    across, down = left + width * len(lengths) + 6, top + height * len(bands) + 48
    parts = [
        f'<svg viewBox="0 0 {across} {down}" role="img" aria-label="{escape(title)}: facts found by depth and length">',
        f'<text x="{left}" y="20" class="title">{escape(title)}: {result.score(mode)} found</text>',
    ]
    for row, column, accuracy in cells(result, mode):
        x, y = left + column * width, top + row * height
        length, tenth = lengths[column], bands[row]
        score = result.score(mode, length, tenth)
        tooltip = f"{score} at {format_size(length)} tokens, depth {band_name(tenth)}"
        parts.append(
            f"<g><title>{tooltip}</title>"
            f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}"'
            f' rx="3" fill="{heat_color(accuracy)}"/>'
            f'<text x="{x + width / 2}" y="{y + height / 2 + 4.5}" class="cell"'
            f' fill="{text_color(accuracy)}">{accuracy:.0%}</text></g>'
        )
    for row, tenth in enumerate(bands):
        parts.append(
            f'<text x="{left - 8}" y="{top + (row + 0.5) * height + 4.5}" class="row">{band_name(tenth)}</text>'
        )
    base = top + height * len(bands)
    for column, length in enumerate(lengths):
        parts.append(
            f'<text x="{left + (column + 0.5) * width}" y="{base + 18}" class="column">{format_size(length)}</text>'
        )
    middle = left + width * len(lengths) / 2
    parts.append(
        f'<text x="{middle}" y="{base + 40}" class="column axis">context length, tokens</text>'
    )
    parts.append(
        f'<text transform="translate(14 {(top + base) / 2}) rotate(-90)" class="column axis">depth of the fact in the text</text>'
    )
    return "\n".join([*parts, "</svg>"])
