"""The heat map over depth and length: as PNG, drawn by matplotlib, and as SVG for the page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from star_attention.demo.result import DENSE, STAR, DemoResult, band_name
from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import heat_color, require_matplotlib, text_color

_TITLE_WIDTH = 2.5
"""Inches of a panel that its title needs."""

PANELS = ((DENSE, "Dense attention"), (STAR, "Star Attention"))


def cells(result: DemoResult, mode: str) -> list[tuple[int, int, float]]:
    """Return `(row, column, accuracy)` of each cell.

    Rows are tenths of the text, from its beginning; columns are lengths, from the shortest.
    """
    return [
        (row, column, result.score(mode, length, tenth).accuracy)
        for row, tenth in enumerate(result.bands)
        for column, length in enumerate(result.lengths)
    ]


def write_png(result: DemoResult, path: Path, caption: str) -> None:
    """Write both panels with the caption below.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = draw(result, caption)
    figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.2)


def draw(result: DemoResult, caption: str) -> Any:
    """Return both panels as a matplotlib figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require_matplotlib()
    # Figure rather than pyplot: no global state, and no windows with any configured backend.
    from matplotlib.figure import Figure

    lengths, bands = result.lengths, result.bands
    panel_width = max(0.9 + 0.75 * len(lengths), _TITLE_WIDTH)
    figure = Figure(
        figsize=(2.6 + 2 * panel_width, 1.9 + 0.36 * len(bands)), dpi=160, layout="constrained"
    )
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (mode, title) in zip(axes, PANELS, strict=True):
        for row, column, accuracy in cells(result, mode):
            _draw_cell(axis, row, column, accuracy)
        axis.set(xlim=(0, len(lengths)), ylim=(len(bands), 0), xlabel="context length, tokens")
        centers = [index + 0.5 for index in range(max(len(lengths), len(bands)))]
        axis.set_xticks(centers[: len(lengths)], [format_size(length) for length in lengths])
        axis.set_yticks(centers[: len(bands)], [band_name(tenth) for tenth in bands])
        axis.set_title(
            f"{title}: {result.score(mode)} found", fontsize=11, fontweight="bold", pad=8
        )
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("depth of the fact in the text")
    figure.supxlabel(caption, fontsize=8.5, color="#444444")
    return figure


def _draw_cell(axis: Any, row: int, column: int, accuracy: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (column + 0.02, row + 0.03)
    axis.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=heat_color(accuracy), linewidth=0))
    axis.text(
        column + 0.5,
        row + 0.52,
        f"{accuracy:.0%}",
        color=text_color(accuracy),
        ha="center",
        va="center",
        fontsize=8.5,
    )


def svg(result: DemoResult, mode: str, title: str) -> str:
    """Return one panel. Its text has the page's color (`currentColor`)."""
    lengths, bands = result.lengths, result.bands
    # Wide enough for the title.
    width, height, left, top = max(74, 300 // len(lengths)), 30, 84, 40
    right, bottom = left + width * len(lengths), top + height * len(bands)
    center, middle = (left + right) / 2, (top + bottom) / 2
    label = f"{title}: facts found by depth and length"
    parts = [
        f'<svg viewBox="0 0 {right + 6} {bottom + 48}" role="img" aria-label="{escape(label)}">',
        _text(left, 20, f"{title}: {result.score(mode)} found", "title"),
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
        parts.append(_text(left - 8, top + (row + 0.5) * height + 4.5, band_name(tenth), "row"))
    for column, length in enumerate(lengths):
        column_center = left + (column + 0.5) * width
        parts.append(_text(column_center, bottom + 18, format_size(length), "column"))
    parts.append(_text(center, bottom + 40, "context length, tokens", "column axis"))
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" class="column axis">'
        "depth of the fact in the text</text>"
    )
    return "\n".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, css_class: str) -> str:
    return f'<text x="{x}" y="{y}" class="{css_class}">{escape(text)}</text>'
