"""How large JSON values are, without writing them as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any


def characters_in(*values: Any, most: int | None = None) -> int:
    """Return about the characters of values as JSON, and no more than `most` if that is enough.

    A book is not looked through: each text tells how long it is.

    Args:
        values: JSON values, or lists of them in other objects' fields.
        most: where to stop counting; None for nowhere.
    """
    characters = 0
    for value in _parts(list(values)):
        # What stands around it: quotes, a comma, digits.
        characters += 4 + (len(value) if isinstance(value, str) else 0)
        if most is not None and characters >= most:
            return most
    return characters


def bytes_of(*values: Any) -> int:
    """Return the bytes of values in memory; those that come twice count twice."""
    return sum(map(sys.getsizeof, _parts(list(values))))


def _parts(left: list[Any]) -> Iterator[Any]:
    """Yield values, and all that is in them, names of fields too."""
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
