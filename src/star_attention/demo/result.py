"""What the demo measured: every encoded context with its answers, and the sums that its table and pictures show."""

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
class Answer:
    """One question: the number that was planted, what the model said, and where the fact stood (`haystack.Fact`)."""

    key: str
    number: str
    depth: float
    position: int
    text: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One context, encoded in one mode, and asked for all of its facts.

    length: tokens asked for; tokens: tokens that the whole lines came to. encode_s: phase 1. first_token_s: from one
    question, asked alone, to its first token. kv_bytes: keys and values of the context.
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
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many of `asked` questions were answered correctly."""

    correct: int
    asked: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked

    def __str__(self) -> str:
        return f"{self.correct} of {self.asked}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode at the full length: accuracy over all contexts, medians of the times; ratios are against dense."""

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
    """One planted fact as the model met it: the lines around it, and the query."""

    before: str
    line: str
    after: str
    query: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything that a run of the demo measured.

    settings: model, parameters, tokens, seed, facts, samples, dtype, device, threads. versions: by name. total_s: the whole run.
    """

    trials: tuple[Trial, ...]
    example: Example
    settings: dict[str, Any]
    versions: dict[str, str]
    total_s: float

    @property
    def length(self) -> int:
        """The full length, of which the table speaks."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        return sorted({trial.length for trial in self.trials})

    @property
    def bands(self) -> list[int]:
        """The tenths of the text, from 0, that facts stood in."""
        return sorted({band(answer.depth) for trial in self.trials for answer in trial.answers})

    @property
    def rows(self) -> list[Row]:
        """The table at the full length, dense first."""
        return [self.row(mode) for mode in MODES]

    def row(self, mode: str) -> Row:
        mine, dense = self._at(mode, self.length), self._at(DENSE, self.length)
        encode_s, first_token_s = _median(mine, "encode_s"), _median(mine, "first_token_s")
        return Row(
            mode=mode,
            score=_score(mine),
            num_blocks=mine[0].num_blocks,
            block_size=mine[0].block_size,
            anchor_size=mine[0].anchor_size,
            encode_s=encode_s,
            first_token_s=first_token_s,
            kv_bytes=mine[0].kv_bytes,
            encode_ratio=encode_s / _median(dense, "encode_s"),
            first_token_ratio=first_token_s / _median(dense, "first_token_s"),
            kv_ratio=mine[0].kv_bytes / dense[0].kv_bytes,
        )

    def score(self, mode: str, length: int | None = None, tenth: int | None = None) -> Score:
        """Correct answers of one mode, over all lengths and the whole text, or at one length and in one tenth."""
        lengths = self.lengths if length is None else [length]
        return _score([trial for one in lengths for trial in self._at(mode, one)], tenth)

    def _at(self, mode: str, length: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.mode == mode and trial.length == length]

    def __str__(self) -> str:
        from star_attention.demo.report import as_text

        return as_text(self)


def band(depth: float) -> int:
    """The tenth of the text that a depth of 0..1 lies in, from 0; the very end belongs to the last."""
    return min(int(depth * BANDS), BANDS - 1)


def band_name(tenth: int) -> str:
    return f"{100 * tenth // BANDS}–{100 * (tenth + 1) // BANDS}%"


def _median(trials: list[Trial], name: str) -> float:
    return float(statistics.median(getattr(trial, name) for trial in trials))


def _score(trials: Iterable[Trial], tenth: int | None = None) -> Score:
    answers = [
        one
        for trial in trials
        for one in trial.answers
        if tenth is None or band(one.depth) == tenth
    ]
    return Score(correct=sum(one.correct for one in answers), asked=len(answers))
