"""Presets: how far blocks look back, in one word that settings are made of.

Standard library only.
"""

from __future__ import annotations

from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.planning.lookback import ALL, LOWER

PAPER, BALANCED, HIGH = "paper", "balanced", "high"

HALF_LOOKS_BACK = {BALANCED: 2, HIGH: 6}
"""Blocks that a preset looks back in half of the layers; a calibration says in which."""


def all_look_back(quality: str) -> int:
    """Return the blocks that all layers may look back at the price of a preset."""
    return HALF_LOOKS_BACK[quality] // 2


QUALITIES: dict[str, dict[str, Any]] = {
    PAPER: {"lookback": 0, "lookback_layers": ALL, "anchor_size": None},
    **{
        quality: {"lookback": blocks, "lookback_layers": LOWER, "anchor_size": None}
        for quality, blocks in HALF_LOOKS_BACK.items()
    },
}
"""Fields of `StarConfig` by preset. None as the anchor is the default: the block size without
look-back, a sink with it."""

QUALITY_HELP = (
    "Preset of look-back: paper (none), balanced (the cost of the paper's method, better answers),"
    " or high (looks back further, and costs more); --lookback, --lookback-layers and --anchor-size"
    " take precedence."
)


def expanded(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the setting `quality` by the fields that it stands for.

    Args:
        settings: fields of `StarConfig` by name, and perhaps `quality`. Fields that are given come
            before the preset's; an anchor size of None is not given.

    Raises:
        InvalidInputError: an unknown preset.
    """
    others = {name: value for name, value in settings.items() if name != "quality"}
    quality = settings.get("quality")
    if quality is None:
        return others
    if not isinstance(quality, str) or quality not in QUALITIES:
        raise InvalidInputError(
            f"quality {quote(quality)} is unknown; choose one of {', '.join(QUALITIES)}"
        )
    explicit = {name for name, value in others.items() if value is not None}
    preset = QUALITIES[quality].items()
    return others | {name: value for name, value in preset if name not in explicit}
