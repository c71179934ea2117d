"""The record of one question on one context, for all tasks, data sets and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from star_attention.errors import InvalidInputError, quote

MAX_TOKENS = 10**10 - 1
"""The largest number of tokens that a data set may give, far beyond any model."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question on one context.

    The model sees context, query and answer prefix joined; phase 1 ends between context and query.

    Attributes:
        id: Unique within a run; the same for the same task, length, seed and index.
        task: Name of the task, such as "niah_single_1".
        length: Tokens that context, query, answer prefix and answer were sized for; 0 if the data
            set does not say.
        context: Text that phase 1 encodes.
        query: The question.
        answer_prefix: Beginning of the answer, which the model continues.
        answers: Right answers, as `metric` understands them.
        max_new_tokens: Most tokens of an answer.
        metric: Name in `metrics.METRICS`.
        meta: Everything else that describes the sample (depths, source of its prose, ...), as JSON
            values.
    """

    id: str
    task: str
    length: int
    context: str
    query: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Name that scores are reported under: `meta["category"]` as in RULER, else the task."""
        return str(self.meta.get("category", self.task))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"answers": list(self.answers), "meta": dict(self.meta)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sample:
        """Return the sample with these fields; `meta` may be left out.

        Raises:
            InvalidInputError: A field is missing, unknown, or of the wrong type.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted(known - set(values) - {"meta"})
        if unknown or missing:
            problems = [f"{name} is missing" for name in missing]
            problems += [f"{name} is unknown" for name in unknown]
            raise InvalidInputError(f"not a sample: {', '.join(problems)}")
        answers = values["answers"]
        if (
            not isinstance(answers, list | tuple)
            or not answers
            or not all(isinstance(answer, str) and answer.strip() for answer in answers)
        ):
            raise InvalidInputError(
                "not a sample: expected answers to be a list of one or more non-empty strings, got"
                f" {quote(answers)}"
            )
        meta = {} if values.get("meta") is None else values["meta"]
        if not isinstance(meta, Mapping):
            raise InvalidInputError(
                f"not a sample: expected meta to be an object, got {quote(meta)}"
            )
        for name in ("id", "task", "context", "query", "answer_prefix", "metric"):
            if not isinstance(values[name], str):
                raise InvalidInputError(
                    f"not a sample: expected {name} to be a string, got {quote(values[name])}"
                )
        for name in ("length", "max_new_tokens"):
            value = values[name]
            if (
                not isinstance(value, int)
                or isinstance(value, bool)
                or not 0 <= value <= MAX_TOKENS
            ):
                raise InvalidInputError(
                    f"not a sample: expected {name} to be a number of tokens, got {quote(value)}"
                )
        return cls(**{**values, "answers": tuple(answers), "meta": dict(meta)})
