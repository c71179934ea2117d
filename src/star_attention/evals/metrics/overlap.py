"""InfiniteBench's F1 metrics: the overlap of the prediction with the closest answer."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from star_attention.evals.samples.sample import Sample


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
        if not character.isspace() and not _is_punctuation(character)
    ]


def _is_punctuation(character: str) -> bool:
    """Return True for punctuation: ASCII (also full-width), Chinese, quotation marks, dashes."""
    if unicodedata.normalize("NFKC", character) in string.punctuation:
        return True
    return unicodedata.category(character)[0] == "P" and (
        "\u2010" <= character <= "\u2027" or "\u3000" <= character <= "\uffef"
    )


def _f1(predicted: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(predicted) & Counter(answer)).values())
    return 2 * common / (len(predicted) + len(answer)) if common else 0.0
