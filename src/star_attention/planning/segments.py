"""Runs of context tokens: which ones a rank holds, and where. Standard library only."""

from __future__ import annotations


class Segments(tuple[tuple[int, int], ...]):
    """Runs `[start, stop)` of context tokens, in the order in which a rank's buffers hold them.

    An ordinary tuple of pairs that also counts and locates its tokens, so that it compares, pickles
    and serializes to JSON as one: `Segments([(0, 4), (96, 128)])`.
    """

    __slots__ = ()

    @classmethod
    def prefix(cls, tokens: int) -> Segments:
        """The first `tokens` tokens of a context."""
        return cls([(0, tokens)] if tokens else [])

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(stop - start for start, stop in self)

    def holds(self, token: int) -> bool:
        """True if context token `token` is in one of the runs."""
        return any(start <= token < stop for start, stop in self)

    def offset(self, token: int) -> int:
        """Position of context token `token` in the buffers."""
        offset = 0
        for start, stop in self:
            if start <= token < stop:
                return offset + token - start
            offset += stop - start
        raise AssertionError(f"token {token} is not in segments {tuple(self)}")

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of the runs that lie in `start..stop`, each in one run."""
        parts = [(max(start, first), min(stop, last)) for first, last in self]
        return [(first, last) for first, last in parts if first < last]

    def grow_to(self, stop: int) -> Segments:
        """The same runs, with the last one ending at `stop`."""
        *earlier, (start, _) = self
        return Segments([*earlier, (start, stop)])
