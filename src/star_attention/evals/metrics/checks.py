"""Checks of a sample before it is answered, so that a bad one does not end a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.metrics import score
from star_attention.evals.samples.sample import Sample
from star_attention.hf.text.checks import check_is_text

_SURROGATE = re.compile("[\ud800-\udfff]")


def check(sample: Sample) -> None:
    """Check that a sample can be answered, scored and recorded.

    Raises:
        InvalidInputError: A text is missing, holds half a character or is none (a PDF, NULs), the
            metric is unknown or cannot read the answers, no prediction or an empty one would be
            right, or `meta` is not JSON.
    """
    if not sample.context.strip():
        raise InvalidInputError(f"sample {sample.id} has no context; give it one")
    if not sample.query.strip() and not sample.answer_prefix.strip():
        raise InvalidInputError(f"sample {sample.id} has no query; give it one")
    try:
        json.dumps(dict(sample.meta), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"meta of sample {sample.id} cannot be written as JSON ({error}); give strings,"
            " numbers and lists of them"
        ) from None
    check_characters(sample.as_dict())
    for field in ("context", "query", "answer_prefix"):
        check_is_text(getattr(sample, field), f"the {field} of sample {sample.id}")
    # Scoring an empty answer finds unknown metrics and unreadable answers before the first one.
    if score("", sample) > 0:
        raise InvalidInputError(
            f"sample {sample.id} scores an empty answer as right (answers"
            f" {quote(list(sample.answers))}, metric {sample.metric}); give answers that are not"
            " empty"
        )


def check_characters(values: Mapping[str, Any]) -> None:
    """Refuse halves of characters, which JSON may hold as escapes and no tokenizer takes.

    Raises:
        InvalidInputError: A text holds one; the message names its field and place.
    """
    for field, text in _texts(values, ""):
        half = None if text.isascii() else _SURROGATE.search(text)
        if half is not None:
            raise InvalidInputError(
                f"field {quote(field)} holds a lone surrogate (half a character),"
                f" \\u{ord(half[0]):04x}, at offset {half.start():,}; remove it, or write \\ufffd"
            )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Return all texts in a JSON value, keys included, with the names of their fields."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield path, str(name)
            yield from _texts(entry, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _texts(entry, f"{path}[{index}]")
