"""Means with their standard errors, and differences between two methods on the same samples with an interval around them.

Samples that share a context are no independent draws, so that contexts are what is drawn and counted here; where each sample has
its own, these are the textbook formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from star_attention.errors import InvalidInputError

RESAMPLES = 4000
LEAST = 6
"""Contexts of a cell: with fewer, errors and intervals say less than they seem to, and are None."""
LEVEL = 0.95
_DRAWS = 4_000_000
"""Random numbers held at once."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One score: of which sample, in which cell (task and length), on which context and prose ("" for none)."""

    sample: str
    cell: str
    context: str
    score: float
    prose: str = ""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """stderr: None where a cell has fewer than `LEAST` contexts. contexts: independent ones among the `n` samples."""

    value: float
    stderr: float | None
    n: int
    contexts: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of one method minus that of another. low, high: the 95 % interval; None where a cell has fewer than `LEAST` contexts."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """In words; an interval that holds 0 shows no difference."""
        if self.low is None or self.high is None:
            return "too few samples to say"
        if self.low <= 0 <= self.high:
            return "no difference seen"
        return "higher" if self.value > 0 else "lower"

    def within(self, least: float, most: float) -> Difference:
        """With an interval of what differences can be; the bootstrap, being stretched, knows of no limits."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(least, self.low), high=min(most, self.high))


def mean(scores: Iterable[Scored]) -> Mean:
    """Over cells: the mean of their means, with the standard error that follows from theirs.

    Raises `InvalidInputError` where there are no scores.
    """
    cells = [_clusters(cell) for cell in _by_cell(scores).values()]
    if not cells:
        raise InvalidInputError("there are no scores to take the mean of; run some samples first")
    errors = [_stderr(cell) for cell in cells]
    return Mean(
        value=math.fsum(_mean(cell) for cell in cells) / len(cells),
        stderr=None
        if None in errors
        else math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(cells),
        n=sum(count for cell in cells for _, count in cell),
        contexts=sum(len(cell) for cell in cells),
    )


def paired(
    one: Iterable[Scored],
    other: Iterable[Scored],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """`one` minus `other` on the same samples, by the bootstrap: contexts are drawn with replacement within each cell, and what is
    drawn is the mean over cells of their means.

    (Deviations are stretched by sqrt(n / (n - 1)), as the bootstrap's variance is short by that: Hesterberg 2015, section 3.2.)

    Raises `InvalidInputError` where the samples, their cells or their prose differ.
    """
    ours, theirs = ({score.sample: score for score in scores} for scores in (one, other))
    check_pairs(ours, theirs)
    differences = [
        Scored(
            sample=name,
            cell=score.cell,
            context=score.context,
            score=score.score - theirs[name].score,
        )
        for name, score in ours.items()
    ]
    cells = [_clusters(cell) for cell in _by_cell(differences).values()]
    value = math.fsum(_mean(cell) for cell in cells) / len(cells)
    n = len(differences)
    if any(len(cell) < LEAST for cell in cells):
        return Difference(value=value, low=None, high=None, n=n)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(resamples, dtype=torch.float64)
    for cell in cells:
        stretch = math.sqrt(len(cell) / (len(cell) - 1))
        total += _mean(cell) + stretch * (_resampled(cell, resamples, generator) - _mean(cell))
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(total / len(cells), bounds).tolist()
    # (Sums in another order leave a few last bits, which must not turn "the same" into a difference.)
    return Difference(value=_clean(value), low=_clean(low), high=_clean(high), n=n)


def check_pairs(ours: Mapping[str, Scored], theirs: Mapping[str, Scored]) -> None:
    """Raises `InvalidInputError` unless both are scores of the same samples."""
    if not ours:
        raise InvalidInputError("there are no scores to compare; run some samples first")
    alone = sorted(set(ours) ^ set(theirs))
    if alone:
        raise InvalidInputError(
            f"{len(alone):,} samples have a score on one side only, {alone[0]} first; compare the same samples"
        )
    for name, score in ours.items():
        other = theirs[name]
        if score.prose != other.prose:
            raise InvalidInputError(
                f"sample {name} is made of different prose ({score.prose or 'none'}, {other.prose or 'none'}); such results are no"
                " pair, run both on the same text"
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
    """The sum and the number of the scores on each context."""
    found: dict[str, list[float]] = {}
    for score in scores:
        found.setdefault(score.context, []).append(score.score)
    return [(math.fsum(some), len(some)) for some in found.values()]


def _mean(cell: list[tuple[float, int]]) -> float:
    return math.fsum(total for total, _ in cell) / sum(count for _, count in cell)


def _stderr(cell: list[tuple[float, int]]) -> float | None:
    clusters = len(cell)
    if clusters < LEAST:
        return None
    middle, n = _mean(cell), sum(count for _, count in cell)
    squares = math.fsum((total - count * middle) ** 2 for total, count in cell)
    return math.sqrt(squares * clusters / (clusters - 1)) / n


def _resampled(
    cell: list[tuple[float, int]], resamples: int, generator: torch.Generator
) -> torch.Tensor:
    """Means of `resamples` draws of as many contexts as there are, fp64 `[resamples]`."""
    sums, counts = (torch.tensor(part, dtype=torch.float64) for part in zip(*cell, strict=True))
    at_once = max(1, _DRAWS // len(cell))
    parts = []
    for start in range(0, resamples, at_once):
        drawn = torch.randint(
            len(cell), (min(at_once, resamples - start), len(cell)), generator=generator
        )
        parts.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return torch.cat(parts)


def _clean(value: float) -> float:
    return 0.0 if abs(value) < 1e-12 else value
