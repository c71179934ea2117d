"""InfiniteBench's metrics for numbers, as published (`compute_scores.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.metrics.words import split_words
from star_attention.evals.samples.sample import Sample


def first_integer(prediction: str, sample: Sample) -> float:
    """Return 1 if the first run of digits is an answer, digit for digit."""
    digits = re.search(r"[0-9]+", prediction)
    return float(digits is not None and digits[0] in sample.answers)


def last_integer(prediction: str, sample: Sample) -> float:
    """Return 1 if the last word is an integer and equal to an answer."""
    answers = _parse_answers(sample, int)
    words = split_words(prediction, "\n.`'\":")
    return float(bool(words) and _integer(words[-1]) in answers)


def first_number(prediction: str, sample: Sample) -> float:
    """Return 1 if the first number, with decimals but without its sign, is equal to an answer."""
    answers = _parse_answers(sample, float)
    number = re.search(r"\d+(\.\d+)?", prediction)
    return float(number is not None and float(number[0]) in answers)


def first_number_truncated(prediction: str, sample: Sample) -> float:
    """Return 1 like `first_number`, or if the answer is the number without decimals (SCBench)."""
    number = re.search(r"\d+(\.\d+)?", prediction)
    answers = _parse_answers(sample, float)
    if number is None:
        return 0.0
    value = float(number[0])
    return float(
        any(
            value == answer or (re.fullmatch(r"\d+", text.strip()) and value // 1 == answer)
            for text, answer in zip(sample.answers, answers, strict=True)
        )
    )


def leading_integers(prediction: str, sample: Sample) -> float:
    """Return the share of the answers before the first that differs from the prediction's integers.

    Signs of predictions are ignored, as in the published score; signs of answers are ignored too,
    so that a correct prediction scores 1.
    """
    predicted = [_integer(number) for number in re.findall(r"[0-9]+", prediction)]
    answers = [abs(value) for value in _parse_answers(sample, int)]
    pairs = zip(predicted, answers, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(answers)


def _integer(text: str) -> int | None:
    """Return the value of a number, or None for another word, and beyond Python's most digits."""
    try:
        return int(text)
    except ValueError:
        return None


def _parse_answers(sample: Sample, parse: Callable[[str], float]) -> list[float]:
    try:
        return [parse(answer) for answer in sample.answers]
    except ValueError:
        raise InvalidInputError(
            f"metric {sample.metric} of sample {sample.id} needs numeric answers, got"
            f" {quote(', '.join(sample.answers))}"
        ) from None
