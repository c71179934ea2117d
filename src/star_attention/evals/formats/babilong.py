"""BABILong's published rows: `input`, `question`, `target`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.formats.format import Format
from star_attention.evals.formats.row import Row
from star_attention.evals.metrics.babilong import LABELS
from star_attention.evals.samples.sample import Sample
from star_attention.evals.suites.babilong import SUITE
from star_attention.evals.suites.babilong.generate import framed_sample
from star_attention.evals.suites.babilong.prompts import read_frame

FIELDS = ("input", "question", "target")


def sample_of(
    values: Mapping[str, Any], *, task: str, id: str, length: int = 0, prompts: str | None = None
) -> Sample:
    """Return the sample of a published row.

    Args:
        values: Fields of the row.
        task: One of qa1 to qa5; up to qa20 with published prompts.
        id: Id of the sample.
        length: Length of the sample; published lengths are counted in other tokens.
        prompts: Path of the published prompts; None for our own.

    Raises:
        InvalidInputError: The task has no prompt, a field is missing or not a string, or the
            prompts cannot be read.
    """
    if task not in LABELS:
        raise InvalidInputError(
            f"task {quote(task)} of BABILong is unknown; choose from {', '.join(LABELS)}"
        )
    if task not in SUITE.tasks and prompts is None:
        raise InvalidInputError(
            f"task {quote(task)} of BABILong has no prompt here, unlike"
            f" {', '.join(SUITE.tasks)}; give the published prompts (--prompts)"
        )
    for field in FIELDS:
        value = values.get(field)
        if not isinstance(value, str):
            raise InvalidInputError(f"expected {field} to be a string, got {quote(value)}")
    return framed_sample(
        read_frame(task, prompts),
        id=id,
        task=task,
        length=length,
        text=values["input"],
        question=values["question"],
        answer=values["target"],
        meta={},
    )


def _read(row: Row) -> list[Sample]:
    task = _task(row)
    for field in FIELDS:
        if not row.text(field).strip():
            raise InvalidInputError(f"{field} is empty; mend the line, or remove it")
    return [
        sample_of(
            row.values,
            task=task,
            id=row.id_for(task),
            length=row.named_length,
            prompts=row.prompts,
        )
    ]


def _task(row: Row) -> str:
    """Return the field `task`, the "qa1" in the name of the file, or the closest folder "qa1"."""
    if row.values.get("task") is not None:
        return row.text("task")
    stem, *folders = row.names
    match = re.search(r"(?<![a-z0-9])qa\d+(?!\d)", stem)
    if match:
        return match[0]
    for name in folders:
        if re.fullmatch(r"qa\d+", name):
            return name
    raise InvalidInputError(
        "there is no field task, and neither the file nor a folder is named after a task; rename"
        " the file to, say, qa1.jsonl, or name the fields of other data context, query and answers"
    )


BABILONG = Format(name="babilong", fields=FIELDS, read=_read)
