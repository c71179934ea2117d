"""The one record that every task, data set and metric of the evaluations goes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from star_attention.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question on one context.

    id: unique within a run; the same for the same task, length, seed and index. task: its name ("niah_single_1"). length:
    tokens that context, query, answer prefix and answer were made to fit in; 0 where a data set does not say.
    context, query, answer_prefix: text; what a model sees is the three behind one another. (The cut between context and query is
    where phase 1 ends.)
    answers: the right ones, as `metric` understands them. max_new_tokens: of an answer. metric: a name in `metrics.METRICS`.
    meta: whatever else describes the sample (depths, the source of its prose, ...), as JSON.
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
        """What is reported together: `meta["category"]`, as RULER's tasks have one ("retrieval"), or else the task by itself."""
        return str(self.meta.get("category", self.task))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"answers": list(self.answers), "meta": dict(self.meta)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sample:
        """Raises `InvalidInputError` for fields that are missing, unknown, or of the wrong kind."""
        known = {one.name: one for one in fields(cls)}
        unknown = sorted(set(values) - set(known))
        missing = sorted(set(known) - set(values) - {"meta"})
        if unknown or missing:
            told = [f"{name} is missing" for name in missing] + [
                f"{name} is unknown" for name in unknown
            ]
            raise InvalidInputError(f"not a sample: {', '.join(told)}")
        answers = values["answers"]
        if (
            not isinstance(answers, list | tuple)
            or not answers
            or not all(isinstance(answer, str) and answer.strip() for answer in answers)
        ):
            raise InvalidInputError(
                f"not a sample: answers {answers!r} is no list of texts, at least one and none of them empty"
            )
        meta = {} if values.get("meta") is None else values["meta"]
        if not isinstance(meta, Mapping):
            raise InvalidInputError(f"not a sample: meta {meta!r} has no named fields")
        for name in ("id", "task", "context", "query", "answer_prefix", "metric"):
            if not isinstance(values[name], str):
                raise InvalidInputError(f"not a sample: {name} {values[name]!r} is no text")
        for name in ("length", "max_new_tokens"):
            if (
                not isinstance(values[name], int)
                or isinstance(values[name], bool)
                or values[name] < 0
            ):
                raise InvalidInputError(
                    f"not a sample: {name} {values[name]!r} is no number of tokens"
                )
        return cls(**{**values, "answers": tuple(answers), "meta": dict(meta)})
