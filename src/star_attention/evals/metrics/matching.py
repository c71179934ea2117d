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


def whole_word(prediction: str, sample: Sample) -> float:
    """Return 1 if an answer is one of the prediction's words (InfiniteBench)."""
    words = split_words(prediction, _PUNCTUATION)
    return float(any(answer in words for answer in sample.answers))


def name_word(prediction: str, sample: Sample) -> float:
    """Return 1 if an answer is one of the prediction's words, in any case (InfiniteBench)."""
    words = [word.upper() for word in split_words(prediction, _PUNCTUATION)]
    return float(any(answer.upper() in words for answer in sample.answers))
