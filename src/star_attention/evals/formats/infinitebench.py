"""InfiniteBench's published lines: `context`, `input`, `answer`, `options`, of all 12 tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.formats.format import Format
from star_attention.evals.formats.row import Row
from star_attention.evals.samples.sample import Sample
from star_attention.evals.suites.infinitebench.tasks import TASKS, Parts


def sample_of(values: Mapping[str, Any], *, task: str, id: str) -> Sample:
    """Return the sample of a published line; its `length` is 0.

    The query is `input`, or the task's own question if that is empty, with the options below it.

    Raises:
        InvalidInputError: The task is unknown, or a field is missing or of the wrong type.
    """
    if task not in TASKS:
        raise InvalidInputError(
            f"task {quote(task)} of InfiniteBench is unknown; choose from {', '.join(TASKS)},"
            " or name the fields of other data context, query and answers"
        )
    context, text = values.get("context"), values.get("input", "")
    options = values.get("options") or []
    for name, value in (("context", context), ("input", text)):
        if not isinstance(value, str) or (name == "context" and not value.strip()):
            raise InvalidInputError(f"expected {name} of {task} to be a string, got {quote(value)}")
    question = text.strip() or TASKS[task].question
    if not question:
        raise InvalidInputError(
            f"input of {task} is empty, but must hold the question; check the file"
        )
    parts = Parts(
        context=str(context),
        question=question + option_lines(options),
        answers=_answers(task, values.get("answer"), options),
        prefix="" if ends_with_lead(question) else TASKS[task].prefix,
    )
    return parts.sample(id=id, task=task, length=0)


def ends_with_lead(question: str) -> bool:
    """Return True if a question ends with a colon, that is with the beginning of its answer."""
    return question.rstrip().endswith((":", "\N{FULLWIDTH COLON}"))


def option_lines(options: Any) -> str:
    """Return the lines of four options, A to D, or nothing without options.

    Raises:
        InvalidInputError: `options` is neither empty nor a list of four strings.
    """
    if (
        not isinstance(options, list)
        or len(options) not in (0, 4)
        or not all(isinstance(option, str) for option in options)
    ):
        raise InvalidInputError(f"expected options to be a list of 4 strings, got {quote(options)}")
    return "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))


def _answers(task: str, answer: Any, options: Sequence[str]) -> tuple[str, ...]:
    """Return the answers as strings.

    With options: the letter of the correct one, and its text. For math_calc: all numbers, in order.
    """
    values = answer if isinstance(answer, list) else [answer]
    answers = [str(value) for value in values if value is not None]
    if task == "math_calc":
        answers = [number for text in answers for number in re.findall(r"-?\d+", text)]
    if not answers or not all(map(str.strip, answers)):
        raise InvalidInputError(f"answer {quote(answer)} of {task} is empty")
    if TASKS[task].metric not in ("option_letter", "option_function"):
        return tuple(answers)
    # Published lines hold the text, or the text and the letter; others the letter alone.
    text = answers[0]
    if text not in options and text in tuple("ABCD") and options:
        text = options["ABCD".index(text)]
    if text not in options or answers[1:] not in ([], [_letter(text, options)]):
        raise InvalidInputError(
            f"answer {quote(answer)} of {task} is not one of its options {quote(options)}"
        )
    return _letter(text, options), text


def _letter(text: str, options: Sequence[str]) -> str:
    return "ABCD"[options.index(text)]


def _read(row: Row) -> list[Sample]:
    task = row.task
    sample = sample_of(row.values, task=task, id=row.id_for(task))
    return [replace(sample, length=row.named_length)]


INFINITEBENCH = Format(name="infinitebench", fields=("context", "input", "answer"), read=_read)
