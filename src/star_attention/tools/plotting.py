"""What every picture needs: matplotlib, colors, and the shades of a heat map."""

from __future__ import annotations

import importlib
from typing import Any

from star_attention.errors import MissingPackageError

MISSED, HALF, FOUND = (0xC8, 0x5A, 0x11), (0xF1, 0xEC, 0xE2), (0x1F, 0x5F, 0x9E)
"""Orange, near white, blue: distinct under every common form of color blindness. In grayscale the
printed percentages tell them apart."""


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


def heat_color(accuracy: float) -> str:
    """The `#rrggbb` shade between `MISSED` (0), `HALF` (0.5) and `FOUND` (1)."""
    if accuracy < 0.5:
        low, high, weight = MISSED, HALF, accuracy * 2
    else:
        low, high, weight = HALF, FOUND, accuracy * 2 - 1
    return "#" + "".join(
        f"{round(a + (b - a) * weight):02x}" for a, b in zip(low, high, strict=True)
    )


def text_color(accuracy: float) -> str:
    """A text color that is legible on `heat_color(accuracy)`."""
    return "#1c1c1c" if 0.15 < accuracy < 0.75 else "#ffffff"
