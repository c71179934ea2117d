"""Text that a chat template wrote, and which of it was written by users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


def shared_prefix(texts: Iterable[str]) -> str:
    """Return the longest beginning that all texts have."""
    # Of many strings, the least and the greatest differ first.
    texts = list(texts)
    low, high = min(texts), max(texts)
    bound = min(len(low), len(high))
    # Bisected, because comparing slices is much faster than comparing characters.
    equal, differing = 0, bound + 1
    while differing - equal > 1:
        middle = (equal + differing) // 2
        if low[:middle] == high[:middle]:
            equal = middle
        else:
            differing = middle
    return low[:equal]


@dataclass(frozen=True)
class RenderedText:
    """A rendered part of a chat.

    Attributes:
        text: the text, control tokens of the template included.
        literal: sorted, disjoint spans `(start, end)` of `text`, in characters, that users wrote:
            what looks like a control token there is none. Spans without anything that looks like a
            control token may be left out.
    """

    text: str
    literal: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.text)

    def __add__(self, other: RenderedText) -> RenderedText:
        """Join two parts; a span that ends where the next one begins becomes one with it."""
        spans = list(self.literal)
        for start, end in other.literal:
            start, end = start + len(self.text), end + len(self.text)
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, end))
        return RenderedText(self.text + other.text, tuple(spans))

    def slice(self, start: int = 0, end: int | None = None) -> RenderedText:
        """Return the characters from `start` to `end`, both at least 0, with their spans."""
        end = len(self.text) if end is None else end
        spans = (
            (max(low, start) - start, min(high, end) - start)
            for low, high in self.literal
            if low < end and high > start
        )
        return RenderedText(self.text[start:end], tuple(spans))
