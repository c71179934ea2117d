"""Multiple-choice questions of other people's data, which need their options and a metric."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.formats.row import Row
from star_attention.evals.samples.sample import Sample

_OPTIONS = re.compile(r"(?:choices?|options?)(?:_?[A-E1-5])?|endings|[A-D]")
"""Names of fields that hold the options of a question: LongBench v2, MMLU, RACE, QuALITY, ..."""

_LETTERS = tuple("ABCDE")


def check_choices(row: Row, sample: Sample) -> None:
    """Refuse a multiple-choice question that cannot be answered, or not scored.

    Raises:
        InvalidInputError: The row has options that are not in the question, so that the model would
            not see them; or an answer is a letter, and the row names no metric, so that it would be
            looked for anywhere in a text, where nearly every letter occurs.
    """
    has_metric = bool(row.values.get("metric"))
    name = next((n for n in row.values if _OPTIONS.fullmatch(n) and row.values[n]), None)
    if name is not None:
        is_shown = all(str(text) in sample.query for text in _texts(row.values[name]))
        if not (is_shown and has_metric):
            raise InvalidInputError(
                f"{name} holds options of a multiple-choice question, which the model would not"
                " see; write them into the question, and add a field metric (option_letter for a"
                " letter)"
            )
    letter = next((answer for answer in sample.answers if answer in _LETTERS), None)
    if letter is not None and sample.metric.startswith("string_match") and not has_metric:
        raise InvalidInputError(
            f"answer {quote(letter)} is a letter, which nearly every text contains; add a field"
            " metric (option_letter, or whole_word)"
        )


def _texts(options: Any) -> list[Any]:
    """Return the texts of options: a list of them, one of them, or texts beside labels (ARC)."""
    if isinstance(options, Mapping):
        options = options.get("text", list(options.values()))
    return options if isinstance(options, list) else [options]
