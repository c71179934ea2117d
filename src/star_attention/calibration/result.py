"""What a calibration measured, and the settings that follow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from star_attention.planning.calibration import Lookback
from star_attention.planning.lookback import ALL
from star_attention.planning.sizes import counted

NUM_GROUPS = 6
"""Runs of layers that are measured alone; three of them are half of the layers."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings that are measured.

    Attributes:
        name: its name in reports.
        settings: how far which layers look back.
        large_anchor: True for the paper's anchor, as large as a block.
    """

    name: str
    settings: Lookback
    large_anchor: bool = False


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Mean negative log-likelihood of a token on one sample, in nats: of answers, of the text."""

    facts: float
    text: float

    @property
    def total(self) -> float:
        """The sum, which decides."""
        return self.facts + self.text


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The losses of a variant, sample by sample."""

    variant: Variant
    losses: tuple[Loss, ...]

    @property
    def mean(self) -> float:
        """The mean loss of a sample."""
        return statistics.fmean(loss.total for loss in self.losses)

    def gain(self, over: Measured, part: str = "total") -> Gain:
        """Return how much smaller the loss is than that of another variant."""
        return Gain.of(
            [
                getattr(other, part) - getattr(own, part)
                for own, other in zip(self.losses, over.losses, strict=True)
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A mean of paired differences, with its 95 % interval by Student's t."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gain:
        """Return the mean of at least two differences."""
        count = len(differences)
        value = statistics.fmean(differences)
        half = student_t(count - 1) * statistics.stdev(differences) / math.sqrt(count)
        return cls(value=value, low=value - half, high=value + half)

    def __str__(self) -> str:
        return f"{self.value:+.3f}, {self.low:+.3f} to {self.high:+.3f}"

    @property
    def is_seen(self) -> bool:
        """True if the gain is above 0 beyond the noise."""
        return self.low > 0


def student_t(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, within 1 % from 2 degrees of freedom on.

    Neither the standard library nor torch has it, and the bootstrap of evaluations needs more
    samples than a calibration has. Source: Abramowitz and Stegun, 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))


def edges(num_layers: int) -> list[int]:
    """Return the first layer of each group, and the number of layers.

    Any three neighbors of six groups are half of the layers.
    """
    groups = min(NUM_GROUPS, num_layers)
    return [num_layers * index // groups for index in range(groups + 1)]


def layer_runs(num_layers: int, groups: int) -> list[str]:
    """Return every run of this many neighboring groups, as layer numbers."""
    starts = edges(num_layers)
    return [run(first, stop) for first, stop in zip(starts, starts[groups:], strict=False)]


def run(first: int, stop: int) -> str:
    """Return the spelling of a run of layers."""
    return str(first) if stop - first == 1 else f"{first}-{stop - 1}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """All measurements of a model.

    Attributes:
        floor: blocks see a small anchor only.
        paper: the paper's method, an anchor as large as a block.
        near: all layers look back, at the price of "balanced".
        ceiling: all layers look back, at the price of "high".
        groups: each group of layers alone looks back as far as "balanced".
        halves: each run of half of the layers looks back as far as "balanced".
        far: the best half looks back as far as "high".
    """

    floor: Measured
    paper: Measured
    near: Measured
    ceiling: Measured
    groups: tuple[Measured, ...]
    halves: tuple[Measured, ...]
    far: Measured

    @property
    def best_half(self) -> Measured:
        """The run of half of the layers with the smallest loss."""
        return best_of(self.halves)

    @property
    def worst_half(self) -> Measured:
        """The run of half of the layers with the largest loss."""
        return max(self.halves, key=lambda half: half.mean)

    @property
    def takes_half(self) -> bool:
        """True if the best half of the layers is to look back, False for all layers.

        Halves must differ beyond the noise, and all layers at the same price must not be better
        than the best half beyond the noise.
        """
        half = self.best_half
        return half.gain(self.worst_half).is_seen and not self.near.gain(half).is_seen

    @property
    def balanced(self) -> Lookback:
        """The settings at the price of the paper's method."""
        chosen = self.best_half if self.takes_half else self.near
        return chosen.variant.settings

    @property
    def high(self) -> Lookback:
        """The settings at the price of "high": the same layers look back further."""
        chosen = self.far if self.takes_half else self.ceiling
        return chosen.variant.settings

    @property
    def reason(self) -> str:
        """Why these settings, in a sentence."""
        best, worst = (
            half.variant.settings.lookback_layers for half in (self.best_half, self.worst_half)
        )
        if not best_of((self.ceiling, self.best_half)).gain(self.floor).is_seen:
            return (
                "look-back gains nothing beyond the noise here, in any layers; longer contexts or"
                " more samples may show more"
            )
        halves = self.best_half.gain(self.worst_half)
        if not halves.is_seen:
            return (
                f"layers do not differ beyond the noise ({best} against {worst}: {halves}), so all"
                f" look back {counted(self.balanced.lookback, 'block')}"
            )
        near = self.best_half.gain(self.near)
        if not self.takes_half:
            return (
                f"{self._near} is better than"
                f" {self.best_half.variant.settings.lookback} in layers {best} ({near})"
            )
        return (
            f"layers {best} need other blocks, {worst} do not as much ({halves}); against"
            f" {self._near}, at the same price: {near}"
        )

    @property
    def _near(self) -> str:
        return f"{counted(self.near.variant.settings.lookback, 'block')} in all layers"


def best_of(measured: Sequence[Measured]) -> Measured:
    """Return the variant with the smallest mean loss."""
    return min(measured, key=lambda candidate: candidate.mean)


FLOOR = Variant(name="no look-back", settings=Lookback(lookback=0, lookback_layers=ALL))
PAPER = Variant(
    name="the paper's anchor",
    settings=Lookback(lookback=0, lookback_layers=ALL),
    large_anchor=True,
)
