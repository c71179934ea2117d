"""Metrics that look for the answers in the prediction: RULER's, and two of InfiniteBench's."""

from __future__ import annotations

import re

from star_attention.evals.metrics.words import split_words
from star_attention.evals.samples.sample import Sample

_PUNCTUATION = "\n:\"'.,?!{}"


def string_match_all(prediction: str, sample: Sample) -> float:
    """Return the share of the answers that the prediction contains, in any case (RULER)."""
    text = _normalized(prediction)
    return sum(answer.lower() in text for answer in sample.answers) / len(sample.answers)


def string_match_part(prediction: str, sample: Sample) -> float:
    """Return 1 if the prediction contains any of the answers, in any case (RULER's questions)."""
    text = _normalized(prediction)
    return float(any(answer.lower() in text for answer in sample.answers))


def _normalized(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()


def contains(prediction: str, sample: Sample) -> float:
    """Return 1 if the prediction contains any of the answers, in the same case (SCBench)."""
    return float(any(answer in prediction for answer in sample.answers))


def whole_word(prediction: str, sample: Sample) -> float:
    """Return 1 if an answer is one of the prediction's words (InfiniteBench)."""
    return float(any(_has_words(prediction, answer) for answer in sample.answers))


def name_word(prediction: str, sample: Sample) -> float:
    """Return 1 if an answer is one of the prediction's words, in any case (InfiniteBench).

    Every name of the character counts, and a name of several words counts if they stand in a row.
    The published score looks at the first name only, and never finds one of several words.
    """
    text = prediction.upper()
    return float(any(_has_words(text, answer.upper()) for answer in sample.answers))


def _has_words(text: str, answer: str) -> bool:
    """Return True if the words of an answer stand in a row in a text."""
    words, wanted = split_words(text, _PUNCTUATION), split_words(answer, _PUNCTUATION)
    starts = range(len(words) - len(wanted) + 1)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in starts)
