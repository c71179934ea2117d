"""One sample that is asked of a generator, and what all of RULER's tasks do with it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size


@dataclass(frozen=True, kw_only=True)
class Case:
    """The `index`-th sample of a suite's task: as long as `size` says, random by `seed`.

    label: ends the sample's id, where one index has several samples.
    """

    suite: str
    task: str
    size: Size
    seed: int
    index: int
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def rng(self, *part: str) -> random.Random:
        """The same numbers at each call, so that a sample can be built again with more or fewer units; others for each part."""
        return random.Random(
            " ".join(
                map(str, (self.suite, self.task, self.size.length, self.seed, self.index, *part))
            )
        )

    def sample(
        self,
        context: str,
        query: str,
        answer_prefix: str,
        answers: Iterable[str],
        *,
        max_new_tokens: int,
        metric: str = "string_match_all",
        **meta: Any,
    ) -> Sample:
        return Sample(
            id=f"{self.task}-{self.size.length}-{self.seed}-{self.index}{self.label}",
            task=self.task,
            length=self.size.length,
            context=context,
            query=query,
            answer_prefix=answer_prefix,
            answers=tuple(answers),
            max_new_tokens=max_new_tokens,
            metric=metric,
            meta=meta,
        )


def depths(text: str, parts: Iterable[str]) -> list[float]:
    """Where each part begins in a text that holds it: percent of the characters before the last place it could begin at."""
    return [round(100 * text.index(part) / max(1, len(text) - len(part)), 1) for part in parts]
