"""InfiniteBench's F1 metrics: the overlap of the prediction with the closest answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from star_attention.evals.samples.sample import Sample

_PUNCTUATION = {
    *string.punctuation,
    # Full-width forms, without the full stop and the middle dot.
    *map(chr, (*range(0xFF01, 0xFF0E), 0xFF0F, *range(0xFF1A, 0xFF21), *range(0xFF3B, 0xFF41))),
    *map(chr, range(0xFF5B, 0xFF65)),
    # Chinese punctuation. As published, opening book-title marks stay.
    *map(chr, (*range(0x3001, 0x3004), *range(0x300B, 0x3012), *range(0x3014, 0x3020))),
    *"\u3030\u303e\u303f\ufe4f",
    # Dashes, quotation marks and ellipses.
    *"\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027",
}
"""The characters that InfiniteBench's score of Chinese answers leaves out."""


def token_f1(prediction: str, sample: Sample) -> float:
    """Return the F1 of words in lower case, without ASCII punctuation and articles."""
    return max(_f1(_words(prediction), _words(answer)) for answer in sample.answers)


def _words(text: str) -> list[str]:
    bare = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def character_f1(prediction: str, sample: Sample) -> float:
    """Return the F1 of characters in lower case, without white space and punctuation."""
    return max(_f1(_characters(prediction), _characters(answer)) for answer in sample.answers)


def _characters(text: str) -> list[str]:
    return [
        character
        for character in text.lower()
        if not character.isspace() and character not in _PUNCTUATION
    ]


def _f1(predicted: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(predicted) & Counter(answer)).values())
    return 2 * common / (len(predicted) + len(answer)) if common else 0.0
