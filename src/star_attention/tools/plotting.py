"""Common parts of all pictures: matplotlib, colors, axes, and the shades of a heat map.

The colors are distinct under every common form of color blindness; markers differ as well.
"""

from __future__ import annotations

import importlib
from typing import Any

from star_attention.errors import MissingPackageError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colors of Okabe and Ito (2008)."""
BLACK, GRAY = "#000000", "#777777"
MARKERS = "osD^vP*Xhp"

MISSED, HALF, FOUND = (0xC8, 0x5A, 0x11), (0xF1, 0xEC, 0xE2), (0x1F, 0x5F, 0x9E)
"""Orange, near white, blue. In grayscale the printed percentages distinguish them."""


def require_matplotlib() -> Any:
    """Import matplotlib.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingPackageError(
            "matplotlib, which draws the pictures, is not installed;"
            ' run: pip install "star-attention[plot]"'
        ) from error


def new_figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Return an empty figure and its axes.

    It is not pyplot's, which has global state and opens windows.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    plain_axes(axes)
    return figure, axes


def plain_axes(axes: Any) -> None:
    """Leave two spines, and a faint grid below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def heat_color(accuracy: float) -> str:
    """Return the `#rrggbb` shade between `MISSED` (0), `HALF` (0.5) and `FOUND` (1)."""
    if accuracy < 0.5:
        low, high, weight = MISSED, HALF, accuracy * 2
    else:
        low, high, weight = HALF, FOUND, accuracy * 2 - 1
    return "#" + "".join(
        f"{round(a + (b - a) * weight):02x}" for a, b in zip(low, high, strict=True)
    )


def text_color(accuracy: float) -> str:
    """Return a text color that is legible on `heat_color(accuracy)`."""
    return "#1c1c1c" if 0.15 < accuracy < 0.75 else "#ffffff"
