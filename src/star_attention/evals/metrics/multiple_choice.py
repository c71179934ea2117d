"""InfiniteBench's metrics for multiple choice. The answers are a letter, A to D, and its option."""

from __future__ import annotations

import re

from star_attention.evals.metrics.words import split_words
from star_attention.evals.samples.sample import Sample

_LETTERS = frozenset("ABCD")


def option_letter(prediction: str, sample: Sample) -> float:
    """Return 1 for the right letter or option.

    Takes the letter that the prediction begins with; else the letter or option after "answer is" or
    the like; else the first word that is a letter.
    """
    text = prediction.strip()
    if text[:1] in _LETTERS:
        return float(text[0] in sample.answers)
    text = " ".join(split_words(text, "\n\"'.,?!{}"))
    rest = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return float(rest.startswith(sample.answers))
    letters = [word for word in text.split() if word in _LETTERS]
    return float(bool(letters) and letters[0] in sample.answers)


def option_function(prediction: str, sample: Sample) -> float:
    """Return 1 for the right letter or function.

    Takes the letter that the prediction begins with, if "." or ":" follows; else the letter or
    function after "answer:" or the like. The letter alone counts too, unlike in the published
    score.
    """
    text, letter = prediction.strip(), sample.answers[0]
    if text == letter or text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(r"[\n`'\"*-]|[Oo]ption", " ", text)
    rest = _after(" ".join(text.split()), ("answer is:", "is:", "answer:"))
    return float(rest is not None and rest.startswith(sample.answers))


def _after(text: str, leads: tuple[str, ...]) -> str | None:
    """Return the text after the first lead that it contains, without the character that follows."""
    for lead in leads:
        if lead in text:
            return text.partition(lead)[2][1:]
    return None
