"""Products of parameters of which a share is quick, and the rest is for `make test-slow`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(share: int, *axes: Sequence[Any]) -> list[Any]:
    """Return the product of axes; one case of `share` is quick, the others are marked slow.

    The quick ones take turns: each value of an axis meets every `share`-th value of another.

    Args:
        share: how many cases make one quick case; 0 for none.
        axes: values of one parameter, or tuples of those of several.
    """
    cases = []
    for numbers in itertools.product(*(range(len(axis)) for axis in axes)):
        values: list[Any] = []
        for axis, number in zip(axes, numbers, strict=True):
            value = axis[number]
            values += value if isinstance(value, tuple) else (value,)
        is_quick = share and sum(numbers) % share == 0
        cases.append(pytest.param(*values, marks=() if is_quick else pytest.mark.slow))
    return cases
