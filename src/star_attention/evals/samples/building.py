"""Parts that samples of several suites are built from."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Sequence

from star_attention.evals.samples.sources import Prose, Words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's filler, which InfiniteBench uses as well."""


class Draw:
    """Random keys and values without repeats.

    Args:
        rng: Source of randomness.
        words: Lists for the kind "words"; None if that kind is not drawn.
    """

    def __init__(self, rng: random.Random, words: Words | None) -> None:
        self._rng = rng
        self._words = words
        self._drawn: set[str] = set()

    def __call__(self, kind: str) -> str:
        """Draw a value of a kind: "numbers" (7 digits), "uuids" or "words" (adjective-noun)."""
        while (drawn := self._candidate(kind)) in self._drawn:
            pass
        self._drawn.add(drawn)
        return drawn

    def _candidate(self, kind: str) -> str:
        if kind == "numbers":
            return str(self._rng.randint(1_000_000, 9_999_999))
        if kind == "uuids":
            return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        assert self._words is not None, "there are no word lists to draw from"
        return f"{self._rng.choice(self._words.adjectives)}-{self._rng.choice(self._words.nouns)}"


def opening(prose: Prose, count: int) -> str:
    """Return the first `count` words of a text, which starts over after its last word."""
    rounds, rest = divmod(count, len(prose.words))
    return " ".join(prose.words * rounds + prose.words[:rest])


def scatter(parts: Sequence[str], filler: Sequence[str], rng: random.Random) -> list[str]:
    """Insert parts, in their order, at random places of the filler, including both ends."""
    places = sorted(int(rng.random() * (len(filler) + 1)) for _ in parts)
    return insert(parts, filler, places)


def insert(parts: Sequence[str], filler: Sequence[str], places: Sequence[int]) -> list[str]:
    """Insert each part before the filler element at its place.

    Args:
        parts: Texts to insert.
        filler: Texts between them.
        places: For each part an index into `filler`, ascending, `len(filler)` at most.
    """
    texts: list[str] = []
    start = 0
    for part, place in zip(parts, places, strict=True):
        texts += [*filler[start:place], part]
        start = place
    return texts + list(filler[start:])


def depths(text: str, parts: Iterable[str]) -> list[float]:
    """Return where each part begins in `text`, in percent of its last possible place."""
    return [round(100 * text.index(part) / max(1, len(text) - len(part)), 1) for part in parts]
