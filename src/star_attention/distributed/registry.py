"""Contexts of which every rank holds a part, by a key that is the same on all ranks."""

from __future__ import annotations

import weakref
from typing import Any

from star_attention.errors import InvalidInputError


class ContextRegistry:
    """Contexts by key: rank 0 sends the key, the others look up their part.

    Keys count up. They are equal on all ranks because all ranks create their contexts in the same
    order, so all engines over the same ranks share one registry. It does not keep contexts alive.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._last_key = 0
        self._contexts: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, context: Any) -> int:
        """Register this rank's part of a context and return its key."""
        self._last_key += 1
        self._contexts[self._last_key] = context
        return self._last_key

    def get(self, key: int | None) -> Any:
        """Return this rank's part of a context.

        Raises:
            InvalidInputError: the part no longer exists on this rank.
        """
        context = None if key is None else self._contexts.get(key)
        if context is None:
            raise InvalidInputError(
                f"rank {self._rank} no longer has its part of this context; keep the result of"
                " encode or load_context on all ranks for as long as any rank uses it"
            )
        return context
