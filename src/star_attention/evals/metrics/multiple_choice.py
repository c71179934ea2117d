"""InfiniteBench's metrics for multiple choice. The answers are a letter, A to D, and its option."""

from __future__ import annotations

import re

from star_attention.evals.samples.sample import Sample

_LETTERS = "ABCD"


def option_letter(prediction: str, sample: Sample) -> float:
    """Return 1 for the right letter or option.

    Takes the letter that the prediction begins with, or all of it if that is the option; else the
    letter or option after "answer is" or the like; else the first word that is a letter.
    """
    text = prediction.strip()
    if text[:1] in tuple(_LETTERS):
        return float(text[0] in sample.answers)
    if text in sample.answers:
        return 1.0
    text = _spaced(r"[\n\"'.,?!{}]", text)
    rest = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return float(rest.startswith(sample.answers))
    # As published, runs of letters such as "AB" count as a choice, which is never right.
    letters = [word for word in text.split() if word in _LETTERS]
    return float(bool(letters) and letters[0] in sample.answers)


def option_function(prediction: str, sample: Sample) -> float:
    """Return 1 for the right letter or function.

    Takes the letter that the prediction begins with, if "." or ":" follows; else the letter or
    function after "answer is:" or the like. As published, a letter alone is no answer.
    """
    text, letter = prediction.strip(), sample.answers[0]
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    rest = _after(_spaced(r"[\n`'\"*-]|[Oo]ption", text), ("answer is:", "is:", "answer:"))
    return float(rest is not None and rest.startswith(sample.answers))


def _spaced(pattern: str, text: str) -> str:
    """Replace what matches by spaces, and runs of spaces by one."""
    return re.sub(" +", " ", re.sub(pattern, " ", text))


def _after(text: str, leads: tuple[str, ...]) -> str | None:
    """Return the text after the first lead that it contains, without the character that follows."""
    for lead in leads:
        if lead in text:
            return text.partition(lead)[2][1:]
    return None
