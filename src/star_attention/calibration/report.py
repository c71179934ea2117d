"""The picture of a calibration, as text: a bar for each group of layers."""

from __future__ import annotations

import textwrap

from star_attention.calibration.result import Measured, Result
from star_attention.planning.calibration import Calibration, Lookback
from star_attention.planning.quality import BALANCED, HALF_LOOKS_BACK, HIGH
from star_attention.planning.sizes import counted

_WIDTH = 36
"""Columns of the longest bar."""


def as_text(calibration: Calibration, result: Result) -> str:
    """Draw the gains over no look-back, and say which settings to use."""
    measured = calibration.measured
    rows = [
        *((_layers(group), group) for group in result.groups),
        ("", None),
        *((_layers(half), half) for half in result.halves),
        ("", None),
        *(
            (f"all layers, {counted(_blocks(row), 'block')}", row)
            for row in (result.near, result.ceiling)
        ),
        (f"{_layers(result.far)}, {counted(_blocks(result.far), 'block')}", result.far),
        ("anchor of a block", result.paper),
    ]
    most = max(row.gain(result.floor).value for _, row in rows if row is not None)
    lines = [
        f"{measured['samples']} contexts of {measured['length']:,} tokens in"
        f" {measured['blocks']} blocks: gain over no look-back, in nats per token",
        f"(these layers look back {counted(HALF_LOOKS_BACK[BALANCED], 'block')}, the others none;"
        " in brackets the 95 % interval)",
        "",
    ]
    lines += [
        "" if row is None else f"{name:<21} {_bar(row, result.floor, most)}" for name, row in rows
    ]
    lines += [
        "",
        *textwrap.wrap(f"{result.reason}.", 88),
        "",
        f"{BALANCED:<9} {_options(calibration.settings[BALANCED])}",
        f"{HIGH:<9} {_options(calibration.settings[HIGH])}",
    ]
    return "\n".join(lines)


def _layers(measured: Measured) -> str:
    return measured.variant.settings.lookback_layers


def _blocks(measured: Measured) -> int:
    return measured.variant.settings.lookback


def _bar(measured: Measured, floor: Measured, most: float) -> str:
    gain = measured.gain(floor)
    length = round(_WIDTH * max(0.0, gain.value) / most) if most > 0 else 0
    return f"{'#' * length:<{_WIDTH}} {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def _options(settings: Lookback) -> str:
    return f"--lookback {settings.lookback} --lookback-layers {settings.lookback_layers}"
