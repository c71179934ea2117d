"""A request for one generated sample."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request for the sample `index` of a suite's task.

    Attributes:
        suite: Name of the suite.
        task: Name of the task.
        size: Length that the sample fills.
        seed: Seed of the run.
        index: Number of the sample, from 0.
        options: Values of the suite's options.
        label: End of the sample's id, for several samples of one index.
    """

    suite: str
    task: str
    size: Size
    seed: int
    index: int
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def rng(self, *part: str) -> random.Random:
        """Return a new random generator, seeded with this case and the part of the sample.

        Its numbers are the same at each call, so that a sample can be rebuilt with more or fewer
        units.
        """
        seed = (self.suite, self.task, self.size.length, self.seed, self.index, *part)
        return random.Random(" ".join(map(str, seed)))

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
        """Return a sample with this case's id, task and length."""
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
