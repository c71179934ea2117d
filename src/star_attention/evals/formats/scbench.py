"""SCBench's published lines (Li et al., arXiv 2412.10319): a context and several questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.formats.format import Format
from star_attention.evals.formats.infinitebench import ends_with_lead, option_lines
from star_attention.evals.formats.row import Row
from star_attention.evals.samples.sample import Sample

TASKS = {
    "scbench_kv": ("contains", 150),
    "scbench_kv_hard": ("contains", 150),
    "scbench_kv_compressible": ("contains", 150),
    "scbench_hashhop": ("contains", 150),
    "scbench_prefix_suffix": ("contains", 150),
    "scbench_qa_eng": ("string_match_part", 40),
    "scbench_qa_chn": ("character_f1", 40),
    "scbench_choice_eng": ("option_letter", 40),
    "scbench_many_shot": ("string_match_part", 10),
    "scbench_mf": ("first_number_truncated", 5),
    "scbench_passkey": ("first_integer", 15),
    "scbench_summary": ("rouge_lsum", 200),
    "scbench_vt": ("string_match_all", 30),
}
"""Metric and most new tokens of each task, as published."""
_OTHER_TASKS = ("string_match_all", 128)
"""Metric and most new tokens for files in SCBench's format that are not its own."""


def samples_of(values: Mapping[str, Any], *, task: str, id: str) -> list[Sample]:
    """Return the samples of a published line, one for each turn, on the context alone.

    A turn's own `task`, in files of several tasks, takes precedence. `length` is 0.

    Args:
        values: `{"context", "multi_turns": [{"input", "answer", "options"}, ...]}`.
        task: Task of the file.
        id: Beginning of the ids.

    Raises:
        InvalidInputError: A field is missing or of the wrong type, or the task is one of SCBench's
            without a metric here.
    """
    context, turns = values.get("context"), values.get("multi_turns")
    # scbench_mf's contexts are lists of numbers.
    if isinstance(context, list) and all(isinstance(value, int | float) for value in context):
        context = json.dumps(context)
    if not isinstance(context, str) or not context.strip():
        raise InvalidInputError(f"expected context to be a string, got {quote(context)}")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, Mapping) for turn in turns)
    ):
        raise InvalidInputError(
            f"expected multi_turns to be a list of questions, got {quote(turns)}"
        )
    return [
        _sample(turn, context=f"{context}\n\n", task=str(turn.get("task", task)), id=f"{id}-{i}")
        for i, turn in enumerate(turns)
    ]


def _sample(turn: Mapping[str, Any], *, context: str, task: str, id: str) -> Sample:
    if task.startswith("scbench_") and task not in TASKS:
        raise InvalidInputError(
            f"task {quote(task)} of SCBench has no metric here; choose from {', '.join(TASKS)}"
        )
    metric, max_new_tokens = TASKS.get(task, _OTHER_TASKS)
    question, options = turn.get("input"), turn.get("options") or []
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"expected input of a turn to be a question, got {quote(question)}")
    values = turn.get("answer")
    values = values if isinstance(values, list) else [values]
    answers = [str(value) for value in values if value is not None and str(value).strip()]
    if not answers:
        raise InvalidInputError(f"answer {quote(turn.get('answer'))} of a turn is empty")
    lines = option_lines(options)
    answers += ["ABCD"[options.index(answer)] for answer in answers if answer in options]
    return Sample(
        id=id,
        task=task,
        length=0,
        context=context,
        query=question + lines,
        answer_prefix="" if ends_with_lead(question) else "\nAnswer:",
        answers=tuple(answers),
        max_new_tokens=max_new_tokens,
        metric=metric,
    )


def _read(row: Row) -> list[Sample]:
    task = row.task
    samples = samples_of(row.values, task=task, id=row.id_for(task))
    return [replace(sample, length=row.named_length) for sample in samples]


SCBENCH = Format(name="scbench", fields=("context", "multi_turns"), read=_read)
