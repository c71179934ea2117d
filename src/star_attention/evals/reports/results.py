"""What follows from a run's predictions: means, differences against the baseline, and times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median, mode
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals.reports import stats
from star_attention.evals.reports.stats import Difference, Mean, Scored
from star_attention.evals.runs import run_folder
from star_attention.evals.runs.run_folder import Prediction
from star_attention.evals.runs.variants import Variant, parse
from star_attention.planning.plan import format_size

BASELINE = "dense"


def length_name(length: int) -> str:
    return format_size(length) if length else "as given"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Scores of one variant on some cells, beside the baseline's. difference: None for the baseline itself, and where there is no
    pair; `unpaired` then says why.
    """

    variant: str
    mean: Mean
    difference: Difference | None = None
    unpaired: str | None = None

    def as_dict(self) -> dict[str, Any]:
        told = asdict(self)
        if self.difference is not None:
            told["difference"]["verdict"] = self.difference.verdict
        return told


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians in seconds at one length: encoding, an answer, and a question with its share of the encoding."""

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
    """How many answers of a variant ended at the limit of tokens, and how many of these are not fully right: more tokens might
    have made them so.
    """

    variant: str
    answers: int
    ended: int
    not_right: int


@dataclass(frozen=True)
class Results:
    """The predictions of a run and what follows from them. Tasks, groups and variants stand in the order of the run."""

    run: Mapping[str, Any]
    predictions: tuple[Prediction, ...]
    _compared: dict[tuple[str, str | None, str | None, int | None], Compared] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Raises `InvalidInputError` for a folder that holds no run, or a damaged one (with the line)."""
        return cls(
            run_folder.read_run(Path(folder)), tuple(run_folder.read_predictions(Path(folder)))
        )

    @cached_property
    def variants(self) -> list[str]:
        made = {prediction.variant for prediction in self.predictions}
        return [key for key in self.run["variants"] if key in made]

    @property
    def baseline(self) -> str:
        """What differences are against: dense attention, or else the first variant."""
        return BASELINE if BASELINE in self.variants else self.variants[0]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(prediction.task for prediction in self._ordered))

    @cached_property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(prediction.group for prediction in self._ordered))

    @cached_property
    def lengths(self) -> list[int]:
        return sorted({prediction.length for prediction in self.predictions})

    @cached_property
    def _cells(self) -> dict[tuple[str, int], set[str]]:
        """Variants that have predictions in a cell, by its task and length."""
        found: dict[tuple[str, int], set[str]] = {}
        for prediction in self.predictions:
            found.setdefault((prediction.task, prediction.length), set()).add(prediction.variant)
        return found

    @property
    def partial(self) -> list[tuple[str, int]]:
        """Cells that not all variants have: means over several cells leave them out."""
        return [
            cell for cell, variants in self._cells.items() if len(variants) < len(self.variants)
        ]

    @cached_property
    def _ordered(self) -> list[Prediction]:
        order = {
            cell["task"]: place for place, cell in reversed(list(enumerate(self.run["cells"])))
        }
        return sorted(
            self.predictions, key=lambda prediction: order.get(prediction.task, len(order))
        )

    def name(self, variant: str) -> str:
        return parse(variant).name

    def some(
        self,
        variant: str,
        *,
        task: str | None = None,
        group: str | None = None,
        length: int | None = None,
    ) -> list[Prediction]:
        return [
            prediction
            for prediction in self._by_variant[variant]
            if (task is None or prediction.task == task)
            and (group is None or prediction.group == group)
            and (length is None or prediction.length == length)
        ]

    @cached_property
    def _by_variant(self) -> dict[str, list[Prediction]]:
        found: dict[str, list[Prediction]] = {key: [] for key in self.variants}
        for prediction in self.predictions:
            found[prediction.variant].append(prediction)
        return found

    def scored(self, predictions: Iterable[Prediction]) -> list[Scored]:
        """(Samples on different contexts that are made of one draw say in `meta["cluster"]` that they are not independent.)"""
        return [
            Scored(
                sample=one.sample,
                cell=f"{one.task} {one.length}",
                context=str(one.meta.get("cluster", one.context_sha256)),
                score=one.score,
                prose=str(one.meta.get("prose_sha256", "")),
            )
            for one in predictions
        ]

    def compared(
        self,
        variant: str,
        *,
        task: str | None = None,
        group: str | None = None,
        length: int | None = None,
    ) -> Compared | None:
        """One variant on some of the cells, against the baseline; None where it has no predictions there.

        Several cells count as far as all variants have them, so that variants side by side are measured on the same.
        """
        key = (variant, task, group, length)

        def some(of: str) -> list[Scored]:
            found = self.some(of, task=task, group=group, length=length)
            if task is None or length is None:
                found = [
                    one
                    for one in found
                    if len(self._cells[one.task, one.length]) == len(self.variants)
                ]
            return self.scored(found)

        if key not in self._compared:
            mine = some(variant)
            if not mine:
                return None
            difference, unpaired = None, None
            if variant != self.baseline:
                theirs = some(self.baseline)
                try:
                    difference = stats.paired(mine, theirs).within(
                        -1.0, 1.0
                    )  # (scores are from 0 to 1)
                except InvalidInputError as error:
                    unpaired = str(error)
            self._compared[key] = Compared(
                variant=variant, mean=stats.mean(mine), difference=difference, unpaired=unpaired
            )
        return self._compared[key]

    def speed(self, variant: str, length: int) -> Speed | None:
        some = self.some(variant, length=length)
        if not some:
            return None
        peaks = [one.peak_bytes for one in some if one.peak_bytes is not None]
        return Speed(
            variant=variant,
            length=length,
            encode_s=median(one.encode_s for one in some),
            answer_s=median(one.answer_s for one in some),
            question_s=median(one.question_s for one in some),
            blocks=mode(one.blocks for one in some),
            block_size=mode(one.block_size for one in some),
            anchor_size=mode(one.anchor_size for one in some),
            peak_bytes=max(peaks, default=None),
        )

    def at_limit(
        self, variant: str, *, task: str | None = None, length: int | None = None
    ) -> AtLimit:
        some = self.some(variant, task=task, length=length)
        ended = [one for one in some if one.finish_reason == "length"]
        wrong = sum(one.score < 1 for one in ended)
        return AtLimit(variant=variant, answers=len(some), ended=len(ended), not_right=wrong)

    def star_variants(self) -> list[tuple[str, Variant]]:
        """Those whose block and anchor may be compared."""
        found = [(key, parse(key)) for key in self.variants]
        return [
            (key, variant)
            for key, variant in found
            if variant.method == "star" and not variant.ablates
        ]

    @property
    def missing(self) -> int:
        """Predictions that the run still lacks."""
        wanted: int = sum(
            cell["samples"]
            for variant in self.run["variants"].values()
            for cell in variant["cells"]
        )
        return max(0, wanted - len(self.predictions))

    def prose(self, *, task: str) -> str:
        """Of a task, by name; "" where its samples have none."""
        named = {
            str(one.meta["prose"])
            for one in self.predictions
            if one.task == task and "prose" in one.meta
        }
        return ", ".join(sorted(named))

    def is_timed(self, variant: str) -> bool:
        """(Ablations of the anchor go through code that is not made to be fast.)"""
        return not parse(variant).ablates
