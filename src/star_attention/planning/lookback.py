"""Which layers look back, and how far: settings in words, resolved for a number of layers.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import islice
from typing import Any

from star_attention.errors import InvalidInputError, quote

LOOKBACK_ANCHOR = 64
"""Default anchor size with look-back: a sink. The blocks before are worth more than a large one."""


def sink_size(block_size: int) -> int:
    """Return the default anchor size with look-back, in tokens: at most a block."""
    return min(LOOKBACK_ANCHOR, block_size)


ALL, LOWER, UPPER = "all", "lower", "upper"

MOST = 10_000
"""More layers than any model has, so that a slip of the pen lists no billion numbers."""

_NUMBERS = re.compile(r"\d{1,4}(-\d{1,4})?(\+\d{1,4}(-\d{1,4})?)*")

SYNTAX = (
    "use 'all', 'lower' or 'upper' (half of the layers), a fraction of them such as 0.5 (the"
    " lowest), or numbers such as '0-14+20'"
)


def parse_layers(layers: str | float | Iterable[int]) -> str:
    """Return the one spelling of a set of layers.

    Args:
        layers: "all", "lower", "upper", a fraction of the layers above 0 and up to 1 (the lowest),
            or numbers, counted from 0, as integers or as text: `"0-14+20"`.

    Raises:
        InvalidInputError: anything else.
    """
    error = InvalidInputError(f"lookback_layers {quote(layers)} names no layers; {SYNTAX}")
    if isinstance(layers, bool) or layers is None:
        raise error
    if isinstance(layers, float):
        return _fraction(layers, error)
    if not isinstance(layers, str):
        numbers = _listed(layers)
        if not numbers or not all(type(number) is int and 0 <= number < MOST for number in numbers):
            raise error
        return _as_runs(numbers)
    text = layers.strip().lower().replace(",", "+").replace(" ", "")
    if text in (ALL, LOWER, UPPER):
        return text
    if re.fullmatch(r"\d*\.\d+|1\.0*", text):
        return _fraction(float(text), error)
    if not _NUMBERS.fullmatch(text):
        raise error
    numbers = [number for run in text.split("+") for number in _run(run)]
    if not numbers:
        raise error
    return _as_runs(numbers)


def _fraction(fraction: float, error: InvalidInputError) -> str:
    if not 0 < fraction <= 1:
        raise error
    return ALL if fraction == 1 else LOWER if fraction == 0.5 else f"{fraction:g}"


def _listed(layers: int | Iterable[int]) -> list[Any]:
    """Return the elements of a collection, one more than `MOST` at most; [] for other values."""
    if isinstance(layers, int):
        return [layers]
    if isinstance(layers, (bytes, bytearray)) or not isinstance(layers, Iterable):
        return []
    return [*islice(layers, MOST + 1)]


def _run(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _as_runs(numbers: Iterable[int]) -> str:
    """Write layer numbers as runs: `0-14+20`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


@cache
def layer_numbers(layers: str, num_layers: int) -> frozenset[int]:
    """Return the numbers of the layers that a spelling of `parse_layers` means.

    Args:
        layers: the spelling.
        num_layers: layers of the model. Of an odd number, the lower half is the larger one.

    Raises:
        InvalidInputError: a layer that the model does not have.
    """
    half = -(-num_layers // 2)
    if layers == ALL:
        return frozenset(range(num_layers))
    if layers == LOWER:
        return frozenset(range(half))
    if layers == UPPER:
        return frozenset(range(half, num_layers))
    if "." in layers:
        return frozenset(range(max(1, round(float(layers) * num_layers))))
    numbers = frozenset(number for run in layers.split("+") for number in _run(run))
    if max(numbers) >= num_layers:
        raise InvalidInputError(
            f"lookback_layers {quote(layers)} contains layer {max(numbers)}, and the model has"
            f" layers 0 to {num_layers - 1}; give numbers up to {num_layers - 1}"
        )
    return numbers


def described(lookback: int, lookback_layers: str) -> str:
    """Describe look-back in a few words: "2 in the lower layers", or "0"."""
    if not lookback:
        return "0"
    if lookback_layers in (ALL, LOWER, UPPER):
        words = f"{'' if lookback_layers == ALL else 'the '}{lookback_layers} layers"
    elif "." in lookback_layers:
        words = f"the lowest {float(lookback_layers):.0%} of layers"
    else:
        words = f"layers {lookback_layers}"
    return f"{lookback} in {words}"
