"""Metrics and answer lengths of published tasks, by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.metrics.babilong import LABELS
from star_attention.evals.suites.babilong.generate import MAX_NEW_TOKENS
from star_attention.evals.suites.infinitebench.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of RULER's tasks.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        question: Pattern of the question's beginning (as in kvpress).
    """

    max_new_tokens: int
    question: str


RULER = {
    "niah": Family(max_new_tokens=128, question=r"What (?:is|are all) the special magic"),
    "vt": Family(max_new_tokens=30, question=r"Question: Find all variables"),
    "cwe": Family(max_new_tokens=120, question=r"Question: What are the 10 most common"),
    "fwe": Family(max_new_tokens=50, question=r"Question: Do not provide any explanation"),
    "qa": Family(max_new_tokens=32, question=r"Answer the question based on the given documents"),
}


def family_of(task: str) -> str | None:
    """Return the family in `RULER` of a task, or None."""
    return next((name for name in RULER if re.match(rf"{name}(?:_|$)", task)), None)


def metric_of(task: str, *, strict: bool) -> tuple[str, int]:
    """Return metric and most new tokens of a task.

    Args:
        task: Its name.
        strict: True to refuse unknown names, instead of applying RULER's rule to them.

    Raises:
        InvalidInputError: The name is unknown, and `strict`.
    """
    if task in LABELS:
        return "babilong", MAX_NEW_TOKENS
    if task in TASKS:
        return TASKS[task].metric, TASKS[task].max_new_tokens
    family = family_of(task)
    if family is None and strict:
        raise InvalidInputError(f"no metric is known for task {quote(task)}; add a column metric")
    return (
        "string_match_part" if task.startswith("qa") else "string_match_all",
        128 if family is None else RULER[family].max_new_tokens,
    )
