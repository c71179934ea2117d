"""Contexts and engines of which every rank holds a part, by a key that is the same on all ranks."""

from __future__ import annotations

import weakref
from typing import Any

from star_attention.errors import InvalidInputError

News = tuple[int, list[int]]
"""What rank 0 says about its registry: the last key, and the keys of what still exists there."""


class Registry:
    """Objects by key: rank 0 sends the key, the others look up their part.

    Keys count up. They are equal on all ranks because all ranks make their parts in the same order,
    so all engines over the same ranks share one registry. It keeps nothing alive, except on a rank
    that follows rank 0 (`hold`): nobody else holds the parts there.
    """

    def __init__(self, rank: int, kind: str, remedy: str) -> None:
        """Begin empty.

        Args:
            rank: this rank.
            kind: what the objects are called in errors.
            remedy: what to do where a part no longer exists.
        """
        self._rank, self._kind, self._remedy = rank, kind, remedy
        self._last_key = 0
        self._parts: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._held: dict[int, Any] | None = None

    def add(self, part: Any, key: int | None = None) -> int:
        """Register this rank's part of an object and return its key.

        Args:
            part: the part.
            key: the key that rank 0 gave the object, where it says so; None for the next one.
        """
        self._last_key = self._last_key + 1 if key is None else max(key, self._last_key)
        key = key or self._last_key
        self._parts[key] = part
        if self._held is not None:
            self._held[key] = part
        return key

    def get(self, key: int | None) -> Any:
        """Return this rank's part of an object.

        Raises:
            InvalidInputError: the part no longer exists on this rank.
        """
        part = None if key is None else self._parts.get(key)
        if part is None:
            raise InvalidInputError(
                f"rank {self._rank} no longer has its part of this {self._kind}; {self._remedy}"
            )
        return part

    def hold(self) -> None:
        """Keep all parts alive, until `heed` or `release`."""
        self._held = dict(self._parts)

    def release(self) -> None:
        """Keep nothing alive any more."""
        self._held = None

    def news(self) -> News:
        """Return what the other ranks should know of this rank's parts."""
        return self._last_key, list(self._parts)

    def heed(self, news: News) -> None:
        """Count on from rank 0's last key, and drop held parts of what rank 0 no longer has.

        After an exception in the middle of a call, ranks may have made different numbers of parts.
        """
        self._last_key, alive = news
        if self._held is not None:
            self._held = {key: self._held[key] for key in alive if key in self._held}


def contexts_of(rank: int) -> Registry:
    """Return the registry of a rank's contexts."""
    return Registry(
        rank,
        "context or conversation",
        "keep the results of encode, load_context and generate on all ranks for as long as any rank"
        " uses them",
    )


def engines_of(rank: int) -> Registry:
    """Return the registry of a rank's engines."""
    return Registry(rank, "engine", "keep every StarLLM on all ranks for as long as rank 0 uses it")
