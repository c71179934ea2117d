"""Means with standard errors, and paired differences with confidence intervals.

Samples that share a context are not independent, so contexts are resampled and counted. If every
sample has its own context, these are the textbook formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from star_attention.errors import InvalidInputError

RESAMPLES = 4000
MIN_CONTEXTS = 6
"""Contexts that every cell needs for an error and an interval; with fewer they would mislead."""
LEVEL = 0.95
HIGHER, LOWER = "higher", "lower"
NO_DIFFERENCE, TOO_FEW = "no difference seen", "too few samples to say"

_MAX_DRAWS = 4_000_000
"""Random draws in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The score of one sample.

    Attributes:
        sample: Id of the sample.
        cell: Its task and length.
        context: Identifies the context; samples on one context are not independent.
        score: 0 to 1, or a loss.
        prose: Hash of the sample's prose; "" for none.
    """

    sample: str
    cell: str
    context: str
    score: float
    prose: str = ""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over cells.

    Attributes:
        value: The mean of the cells' means.
        stderr: Its standard error; None if a cell has fewer than `MIN_CONTEXTS` contexts.
        n: Number of samples.
        contexts: Number of independent contexts among them.
    """

    value: float
    stderr: float | None
    n: int
    contexts: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of one method minus that of another.

    Attributes:
        value: The difference.
        low: Lower end of the 95 % interval; None if a cell has fewer than `MIN_CONTEXTS` contexts.
        high: Upper end.
        n: Number of pairs.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """The difference as a phrase: none is seen if the interval contains 0."""
        if self.low is None or self.high is None:
            return TOO_FEW
        if self.low <= 0 <= self.high:
            return NO_DIFFERENCE
        return HIGHER if self.value > 0 else LOWER

    def within(self, lower: float, upper: float) -> Difference:
        """Return the difference with its interval clipped to possible values."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(lower, self.low), high=min(upper, self.high))


def mean(scores: Iterable[Scored]) -> Mean:
    """Return the mean of the cells' means; its standard error follows from those of the cells.

    Raises:
        InvalidInputError: If there are no scores.
    """
    cells = [_clusters(cell) for cell in _by_cell(scores).values()]
    if not cells:
        raise InvalidInputError("there are no scores to average; run some samples first")
    errors = [_stderr(cell) for cell in cells]
    variances = [error**2 for error in errors if error is not None]
    return Mean(
        value=math.fsum(_mean(cell) for cell in cells) / len(cells),
        stderr=None if None in errors else math.sqrt(math.fsum(variances)) / len(cells),
        n=sum(count for cell in cells for _, count in cell),
        contexts=sum(len(cell) for cell in cells),
    )


def paired(
    scores: Iterable[Scored],
    baseline: Iterable[Scored],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Return the mean of `scores` minus that of `baseline`, on the same samples, with an interval.

    Contexts are resampled with replacement within each cell; the statistic is the mean of the
    cells' means. Deviations are stretched by sqrt(n / (n - 1)), by which the bootstrap's variance
    is too small (Hesterberg 2015, section 3.2).

    Args:
        scores: Scores of one method.
        baseline: Scores of the other.
        seed: Seed of the bootstrap.
        resamples: Number of resamples.
        level: Coverage of the interval.

    Raises:
        InvalidInputError: If the samples, their cells or their prose differ.
    """
    pairs = _Pairs.of(scores, baseline)
    if not pairs.suffice:
        return Difference(value=pairs.value, low=None, high=None, n=pairs.n)
    low, high = _ends(pairs.resampled(seed, resamples), level)
    # Summing in another order changes the last bits, which must not make "the same" a difference.
    return Difference(value=_clean(pairs.value), low=_clean(low), high=_clean(high), n=pairs.n)


def share(
    scores: Iterable[Scored],
    baseline: Iterable[Scored],
    best: Iterable[Scored],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Return what share of the way from `baseline` to `best` the scores go, with an interval.

    All three are on the same samples, which are resampled together, as `paired` does.

    Args:
        scores: Scores of one method.
        baseline: Scores of the method whose share is 0.
        best: Scores of the method whose share is 1.
        seed, resamples, level: As for `paired`.

    Returns:
        The share in place of a difference. It has no interval where resamples leave no way to go.

    Raises:
        InvalidInputError: If samples differ, or `best` is no better than `baseline`.
    """
    # In one order, in which the same samples are drawn for both differences.
    own, worst, most = (
        sorted(side, key=lambda each: each.sample) for side in (scores, baseline, best)
    )
    won, whole = _Pairs.of(own, worst), _Pairs.of(most, worst)
    if whole.value <= 0:
        raise InvalidInputError(
            "the better method scores no more than the other; a share of nothing is no number"
        )
    value = won.value / whole.value
    if not whole.suffice:
        return Difference(value=value, low=None, high=None, n=whole.n)
    ways = whole.resampled(seed, resamples)
    if bool((ways <= 0).any()):
        return Difference(value=value, low=None, high=None, n=whole.n)
    low, high = _ends(won.resampled(seed, resamples) / ways, level)
    return Difference(value=value, low=low, high=high, n=whole.n)


@dataclass(frozen=True)
class _Pairs:
    """Differences between two methods on the same samples, summed by context, for each cell."""

    cells: list[list[tuple[float, int]]]

    @classmethod
    def of(cls, scores: Iterable[Scored], baseline: Iterable[Scored]) -> _Pairs:
        """Subtract the baseline's scores; raises `InvalidInputError` if samples differ."""
        own, other = ({score.sample: score for score in side} for side in (scores, baseline))
        check_pairs(own, other)
        differences = [
            replace(score, score=score.score - other[name].score) for name, score in own.items()
        ]
        return cls([_clusters(cell) for cell in _by_cell(differences).values()])

    @property
    def n(self) -> int:
        """Number of pairs."""
        return sum(count for cell in self.cells for _, count in cell)

    @property
    def value(self) -> float:
        """The mean of the cells' means."""
        return math.fsum(_mean(cell) for cell in self.cells) / len(self.cells)

    @property
    def suffice(self) -> bool:
        """True if every cell has enough contexts for an interval."""
        return all(len(cell) >= MIN_CONTEXTS for cell in self.cells)

    def resampled(self, seed: int, resamples: int) -> torch.Tensor:
        """Return `value` of resamples, fp64 `[resamples]`."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(resamples, dtype=torch.float64)
        for cell in self.cells:
            stretch = math.sqrt(len(cell) / (len(cell) - 1))
            total += _mean(cell) + stretch * (_resampled(cell, resamples, generator) - _mean(cell))
        return total / len(self.cells)


def _ends(values: torch.Tensor, level: float) -> list[float]:
    """Return the ends of the interval that holds a part of the values."""
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    ends: list[float] = torch.quantile(values, bounds).tolist()
    return ends


def check_pairs(scores: Mapping[str, Scored], baseline: Mapping[str, Scored]) -> None:
    """Refuse with `InvalidInputError` unless both sides have scores of the same samples."""
    if not scores:
        raise InvalidInputError("there are no scores to compare; run some samples first")
    unmatched = sorted(set(scores) ^ set(baseline))
    if unmatched:
        raise InvalidInputError(
            f"{len(unmatched):,} samples have a score on one side only, {unmatched[0]} first;"
            " compare the same samples"
        )
    for name, score in scores.items():
        other = baseline[name]
        if score.prose != other.prose:
            raise InvalidInputError(
                f"sample {name} is made of different prose ({score.prose or 'none'},"
                f" {other.prose or 'none'}); run both sides on the same text"
            )
        if (score.cell, score.context) != (other.cell, other.context):
            raise InvalidInputError(
                f"sample {name} differs between both sides; run both on the same data"
            )


def _by_cell(scores: Iterable[Scored]) -> dict[str, list[Scored]]:
    cells: dict[str, list[Scored]] = {}
    for score in scores:
        cells.setdefault(score.cell, []).append(score)
    return cells


def _clusters(scores: Sequence[Scored]) -> list[tuple[float, int]]:
    """Return sum and number of the scores on each context."""
    by_context: dict[str, list[float]] = {}
    for score in scores:
        by_context.setdefault(score.context, []).append(score.score)
    return [(math.fsum(values), len(values)) for values in by_context.values()]


def _mean(cell: list[tuple[float, int]]) -> float:
    return math.fsum(total for total, _ in cell) / sum(count for _, count in cell)


def _stderr(cell: list[tuple[float, int]]) -> float | None:
    clusters = len(cell)
    if clusters < MIN_CONTEXTS:
        return None
    center, n = _mean(cell), sum(count for _, count in cell)
    squares = math.fsum((total - count * center) ** 2 for total, count in cell)
    return math.sqrt(squares * clusters / (clusters - 1)) / n


def _resampled(
    cell: list[tuple[float, int]], resamples: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the means of resamples with as many contexts as the cell has, fp64 `[resamples]`."""
    sums, counts = (torch.tensor(column, dtype=torch.float64) for column in zip(*cell, strict=True))
    chunk = max(1, _MAX_DRAWS // len(cell))
    means = []
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), len(cell))
        draws = torch.randint(len(cell), shape, generator=generator)
        means.append(sums[draws].sum(1) / counts[draws].sum(1))
    return torch.cat(means)


def _clean(value: float) -> float:
    return 0.0 if abs(value) < 1e-12 else value
