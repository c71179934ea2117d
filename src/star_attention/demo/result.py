"""The measurements of the demo, and the sums that its table and pictures show."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DENSE, STAR, SMALL, NONE = "dense", "star", "small anchor", "no anchor"
MODES = (DENSE, STAR, SMALL, NONE)

BANDS = 10
"""Rows of the heat map: tenths of the text."""


@dataclass(frozen=True, kw_only=True)
class GradedAnswer:
    """The answer to one question.

    Attributes:
        key, number, depth, position: of the fact, as in `haystack.Fact`.
        text: the model's answer.
        correct: True if it begins with the number.
    """

    key: str
    number: str
    depth: float
    position: int
    text: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One context, encoded in one mode, with a question about each of its facts.

    Attributes:
        mode: one of `MODES`.
        length: the requested number of tokens.
        seed: of the context.
        tokens: the length in tokens, of whole lines.
        num_blocks, block_size, anchor_size: of the plan, in tokens.
        encode_s: time of phase 1.
        first_token_s: time to the first token of the answer to a single question.
        kv_bytes: keys and values of the context.
        answers: in the order of the facts.
    """

    mode: str
    length: int
    seed: int
    tokens: int
    num_blocks: int
    block_size: int
    anchor_size: int
    encode_s: float
    first_token_s: float
    kv_bytes: int
    answers: tuple[GradedAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The number of correct answers to `asked` questions."""

    correct: int
    asked: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked

    def __str__(self) -> str:
        return f"{self.correct} of {self.asked}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode at the full length: accuracy over all contexts, median times, ratios to dense."""

    mode: str
    score: Score
    num_blocks: int
    block_size: int
    anchor_size: int
    encode_s: float
    first_token_s: float
    kv_bytes: int
    encode_ratio: float
    first_token_ratio: float
    kv_ratio: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A planted fact with the lines around it, the query, and the answer."""

    before: str
    line: str
    after: str
    query: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All measurements of a run of the demo.

    Attributes:
        trials: in the order of measurement.
        example: one of the questions.
        settings: model, parameters, tokens, seed, facts, samples, dtype, device, threads.
        versions: by name.
        total_s: time of the whole run.
    """

    trials: tuple[Trial, ...]
    example: Example
    settings: dict[str, Any]
    versions: dict[str, str]
    total_s: float

    @property
    def length(self) -> int:
        """The full length, which the table is about."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        return sorted({trial.length for trial in self.trials})

    @property
    def bands(self) -> list[int]:
        """The tenths of the text, from 0, that contain facts."""
        return sorted({band(answer.depth) for trial in self.trials for answer in trial.answers})

    @property
    def rows(self) -> list[Row]:
        """The table at the full length, dense first."""
        return [self.row(mode) for mode in MODES]

    def row(self, mode: str) -> Row:
        trials, dense = self._at(mode, self.length), self._at(DENSE, self.length)
        encode_s, first_token_s = _median(trials, "encode_s"), _median(trials, "first_token_s")
        first = trials[0]
        return Row(
            mode=mode,
            score=_score(trials),
            num_blocks=first.num_blocks,
            block_size=first.block_size,
            anchor_size=first.anchor_size,
            encode_s=encode_s,
            first_token_s=first_token_s,
            kv_bytes=first.kv_bytes,
            encode_ratio=encode_s / _median(dense, "encode_s"),
            first_token_ratio=first_token_s / _median(dense, "first_token_s"),
            kv_ratio=first.kv_bytes / dense[0].kv_bytes,
        )

    def score(self, mode: str, length: int | None = None, tenth: int | None = None) -> Score:
        """Count the correct answers in one mode.

        Args:
            mode: one of `MODES`.
            length: only of contexts of this length.
            tenth: only of facts in this tenth of the text.
        """
        lengths = self.lengths if length is None else [length]
        return _score((trial for n in lengths for trial in self._at(mode, n)), tenth)

    def _at(self, mode: str, length: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.mode == mode and trial.length == length]


def band(depth: float) -> int:
    """Return the tenth of the text, from 0, that a depth of 0..1 lies in; 1 is in the last."""
    return min(int(depth * BANDS), BANDS - 1)


def band_name(tenth: int) -> str:
    return f"{100 * tenth // BANDS}–{100 * (tenth + 1) // BANDS}%"


def _median(trials: list[Trial], field: str) -> float:
    return float(statistics.median(getattr(trial, field) for trial in trials))


def _score(trials: Iterable[Trial], tenth: int | None = None) -> Score:
    answers = [
        answer
        for trial in trials
        for answer in trial.answers
        if tenth is None or band(answer.depth) == tenth
    ]
    return Score(correct=sum(answer.correct for answer in answers), asked=len(answers))
