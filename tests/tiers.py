"""Products of parameters of which a share is quick, and the rest is for `make test-slow`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def in_turn(
    share: int, *axes: Sequence[Any], quick: Callable[..., bool] = lambda *_: False
) -> list[Any]:
    """Return the product of axes; one case of `share` is quick, the others are marked slow.

    The quick ones take turns: of one axis, every `share`-th value is quick; of two, each value of
    one meets every `share`-th value of the other.

    Beware of tuples in which something alternates, for it coincides with the turns: of (2, "x"),
    (3, "y"), (4, "x"), (5, "y") in turns of two, a family meets "x" alone or "y" alone. Order them
    so that each turn has both: "x", "x", "y", "y".

    Args:
        share: how many cases make one quick case; 0 for none.
        axes: values of one parameter, or tuples of those of several.
        quick: takes the values of a case and says that it is quick whatever its turn.
    """
    cases = []
    for numbers in itertools.product(*(range(len(axis)) for axis in axes)):
        values: list[Any] = []
        for axis, number in zip(axes, numbers, strict=True):
            value = axis[number]
            values += value if isinstance(value, tuple) else (value,)
        is_quick = (share and sum(numbers) % share == 0) or quick(*values)
        cases.append(pytest.param(*values, marks=() if is_quick else pytest.mark.slow))
    return cases
