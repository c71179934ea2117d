"""Rows of other people's data: a text, a question and answers, under the names in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.formats.choices import check_choices
from star_attention.evals.formats.format import Format
from star_attention.evals.formats.prompts import sample_of_row
from star_attention.evals.formats.row import Row, parse_answers
from star_attention.evals.samples.sample import Sample

_QUERY = ("query", "question", "instruction", "prompt", "input")
_CONTEXT = ("context", "document", "passage", "article", "text", "input")
_ANSWERS = (
    "answers",
    "answer",
    "outputs",
    "output",
    "completion",
    "response",
    "target",
    "references",
    "reference",
)

_LONGBENCH_QUESTIONS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
}
"""LongBench's data sets that are scored by token_f1, with their most new tokens."""


def parts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the fields that hold the context, the query and the answers.

    What is not there is left out.
    """
    query = next((name for name in _QUERY if name in values), "")
    context = next((name for name in _CONTEXT if name in values and name != query), "")
    answers = next((name for name in _ANSWERS if name in values), "")
    parts = {"context": context, "query": query, "answers": answers}
    return {part: name for part, name in parts.items() if name}


class _Questions(Format):
    def missing(self, values: Mapping[str, Any]) -> list[str]:
        return [part for part in self.fields if part not in parts_of(values)]


def _read(row: Row) -> list[Sample]:
    parts = parts_of(row.values)
    sample = sample_of_row(
        row,
        context=row.text(parts["context"]),
        query=row.text(parts["query"]),
        answers=_answers(row.values[parts["answers"]]),
    )
    if "all_classes" not in row.values or row.values.get("metric"):
        check_choices(row, sample)
        return [sample]
    # LongBench, whose lengths are words.
    name = row.values.get("dataset") or sample.task
    if name not in _LONGBENCH_QUESTIONS:
        raise InvalidInputError(
            f"no metric is known for data set {quote(name)} of LongBench; add a field metric"
        )
    tokens = row.tokens("max_new_tokens", _LONGBENCH_QUESTIONS[name])
    length = row.named_length
    return [replace(sample, metric="token_f1", max_new_tokens=tokens, length=length)]


def _answers(value: Any) -> tuple[str, ...]:
    """Return the answers, also of SQuAD's form `{"text": [...], "answer_start": [...]}`."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = list(dict.fromkeys(value["text"]))
    return parse_answers(value)


QUESTIONS = _Questions(name="questions", fields=("context", "query", "answers"), read=_read)
