"""Means, differences from the baseline, and times of a run's predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median, mode
from typing import Any

from star_attention.config import BASELINE_METHOD
from star_attention.errors import InvalidInputError
from star_attention.evals import stats
from star_attention.evals.runs.predictions import Prediction, read_predictions
from star_attention.evals.runs.record import Cell
from star_attention.evals.runs.run_folder import read_run
from star_attention.evals.runs.variants import parse
from star_attention.evals.stats import Difference, Mean, Scored
from star_attention.planning.sizes import format_size

DENSE = BASELINE_METHOD
"""Key of the variant that is the baseline of every run that has it."""


def length_name(length: int) -> str:
    """Format a length: `4k`; "as given" if the samples have no length."""
    return format_size(length) if length else "as given"


def variant_name(key: str) -> str:
    """Return the name of a variant in tables and figures."""
    return parse(key).name


def is_timed(key: str) -> bool:
    """Return False for ablations, whose code is not made to be fast."""
    return not parse(key).is_ablation


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Scores of one variant on some cells, compared with the baseline's.

    Attributes:
        variant: Key of the variant.
        mean: The mean of its scores.
        difference: From the baseline; None for the baseline itself, and if the scores cannot be
            paired.
        unpaired: Why they cannot be paired.
    """

    variant: str
    mean: Mean
    difference: Difference | None = None
    unpaired: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the line of metrics.json."""
        line = asdict(self)
        if self.difference is not None:
            line["difference"]["verdict"] = self.difference.verdict
        return line


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians of one variant at one length.

    Attributes:
        variant: Key of the variant.
        length: The length.
        encode_s: Seconds to encode a context.
        answer_s: Seconds for an answer.
        question_s: Seconds for a question, including its share of the encoding.
        blocks: Number of blocks, the most frequent one.
        block_size: Tokens per block, the most frequent number.
        anchor_size: Tokens of the anchor, the most frequent number.
        peak_bytes: Peak device memory, the largest; None on a CPU.
    """

    variant: str
    length: int
    encode_s: float
    answer_s: float
    question_s: float
    blocks: int
    block_size: int
    anchor_size: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class AtLimit:
    """Answers of a variant that ended at the token limit.

    Attributes:
        variant: Key of the variant.
        answers: All its answers.
        ended: Those that ended at the limit.
        not_right: Those of them that are not fully right, which more tokens might have changed.
    """

    variant: str
    answers: int
    ended: int
    not_right: int


def scored(predictions: Iterable[Prediction]) -> list[Scored]:
    """Return the scores for `stats`.

    Samples on different contexts that depend on one another share `meta["cluster"]`.
    """
    return [
        Scored(
            sample=prediction.sample,
            cell=f"{prediction.task} {prediction.length}",
            context=str(prediction.meta.get("cluster", prediction.context_sha256)),
            score=prediction.score,
            prose=str(prediction.meta.get("prose_sha256", "")),
        )
        for prediction in predictions
    ]


@dataclass(frozen=True)
class Results:
    """A run and its predictions. Variants are named by their keys, in the order of the run."""

    run: Mapping[str, Any]
    predictions: tuple[Prediction, ...]
    _comparisons: dict[tuple[str, str | None, str | None, int | None], Comparison | None] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Read a run; raises `InvalidInputError` for a missing or a damaged run, with the line."""
        return cls(read_run(Path(folder)), tuple(read_predictions(Path(folder))))

    @cached_property
    def variants(self) -> list[str]:
        """Keys of the variants that have predictions."""
        answered = {prediction.variant for prediction in self.predictions}
        return [key for key in self.run["variants"] if key in answered]

    @property
    def sweepable(self) -> list[str]:
        """Keys of the variants whose block and anchor sizes may be compared."""
        return [key for key in self.variants if parse(key).is_sweepable]

    @property
    def baseline(self) -> str:
        """Key of the variant that others are compared with: dense attention, or else the first."""
        return DENSE if DENSE in self.variants else self.variants[0]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(prediction.task for prediction in self._by_task))

    @cached_property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(prediction.group for prediction in self._by_task))

    @cached_property
    def lengths(self) -> list[int]:
        return sorted({prediction.length for prediction in self.predictions})

    @property
    def partial(self) -> list[Cell]:
        """Cells that some variants lack; means over several cells leave them out."""
        return [
            cell
            for cell, variants in self._variants_of_cells.items()
            if len(variants) < len(self.variants)
        ]

    @property
    def missing(self) -> int:
        """Number of predictions that the run still lacks."""
        expected: int = sum(
            cell["samples"]
            for variant in self.run["variants"].values()
            for cell in variant["cells"]
        )
        return max(0, expected - len(self.predictions))

    def select(
        self,
        variant: str,
        *,
        task: str | None = None,
        group: str | None = None,
        length: int | None = None,
    ) -> list[Prediction]:
        """Select predictions of a variant, of one task, group or length if given."""
        return [
            prediction
            for prediction in self._by_variant[variant]
            if (task is None or prediction.task == task)
            and (group is None or prediction.group == group)
            and (length is None or prediction.length == length)
        ]

    def compared(
        self,
        variant: str,
        *,
        task: str | None = None,
        group: str | None = None,
        length: int | None = None,
    ) -> Comparison | None:
        """Compare one variant on some cells with the baseline.

        Means over several cells only count cells that all variants have, so that variants in one
        table are measured on the same samples.

        Returns:
            None if the variant has no predictions there.
        """
        key = (variant, task, group, length)
        if key not in self._comparisons:
            self._comparisons[key] = self._compare(*key)
        return self._comparisons[key]

    def _compare(
        self, variant: str, task: str | None, group: str | None, length: int | None
    ) -> Comparison | None:
        scores = self._scores(variant, task, group, length)
        if not scores:
            return None
        difference, unpaired = None, None
        if variant != self.baseline:
            try:
                # Scores are from 0 to 1.
                baseline = self._scores(self.baseline, task, group, length)
                difference = stats.paired(scores, baseline).within(-1.0, 1.0)
            except InvalidInputError as error:
                unpaired = str(error)
        return Comparison(
            variant=variant, mean=stats.mean(scores), difference=difference, unpaired=unpaired
        )

    def won_back(self, variant: str, baseline: str) -> Difference:
        """Return the share of a method's loss, against dense attention, that a variant wins back.

        Args:
            variant: Key of the variant.
            baseline: Key of the method that loses.

        Raises:
            InvalidInputError: If it loses nothing, or was not measured on the same samples.
        """
        own, worst, best = (self._scores(key) for key in (variant, baseline, DENSE))
        return stats.share(own, worst, best)

    def _scores(
        self,
        variant: str,
        task: str | None = None,
        group: str | None = None,
        length: int | None = None,
    ) -> list[Scored]:
        """Return a variant's scores; over several cells, of those that all variants have."""
        predictions = self.select(variant, task=task, group=group, length=length)
        if task is None or length is None:
            predictions = [
                prediction
                for prediction in predictions
                if self._has_all_variants(prediction.task, prediction.length)
            ]
        return scored(predictions)

    def speed(self, variant: str, length: int) -> Speed | None:
        """Return the medians at one length; None if the variant has no predictions there."""
        predictions = self.select(variant, length=length)
        if not predictions:
            return None
        peaks = [line.peak_bytes for line in predictions if line.peak_bytes is not None]
        return Speed(
            variant=variant,
            length=length,
            encode_s=median(line.encode_s for line in predictions),
            answer_s=median(line.answer_s for line in predictions),
            question_s=median(line.question_s for line in predictions),
            blocks=mode(line.blocks for line in predictions),
            block_size=mode(line.block_size for line in predictions),
            anchor_size=mode(line.anchor_size for line in predictions),
            peak_bytes=max(peaks, default=None),
        )

    def at_limit(
        self, variant: str, *, task: str | None = None, length: int | None = None
    ) -> AtLimit:
        predictions = self.select(variant, task=task, length=length)
        ended = [line for line in predictions if line.finish_reason == "length"]
        return AtLimit(
            variant=variant,
            answers=len(predictions),
            ended=len(ended),
            not_right=sum(line.score < 1 for line in ended),
        )

    def prose(self, *, task: str) -> str:
        """Return the names of the prose in a task's samples; "" for none."""
        names = {
            str(prediction.meta["prose"])
            for prediction in self.predictions
            if prediction.task == task and "prose" in prediction.meta
        }
        return ", ".join(sorted(names))

    def _has_all_variants(self, task: str, length: int) -> bool:
        return len(self._variants_of_cells[task, length]) == len(self.variants)

    @cached_property
    def _variants_of_cells(self) -> dict[Cell, set[str]]:
        """The variants that have predictions in a cell."""
        variants: dict[Cell, set[str]] = {}
        for prediction in self.predictions:
            cell = (prediction.task, prediction.length)
            variants.setdefault(cell, set()).add(prediction.variant)
        return variants

    @cached_property
    def _by_task(self) -> list[Prediction]:
        """All predictions, in the order of the run's tasks."""
        order = {
            cell["task"]: place for place, cell in reversed(list(enumerate(self.run["cells"])))
        }
        return sorted(
            self.predictions, key=lambda prediction: order.get(prediction.task, len(order))
        )

    @cached_property
    def _by_variant(self) -> dict[str, list[Prediction]]:
        predictions: dict[str, list[Prediction]] = {key: [] for key in self.variants}
        for prediction in self.predictions:
            predictions[prediction.variant].append(prediction)
        return predictions
