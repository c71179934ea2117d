"""Drawing of the next token of many rows, each by settings of its own.

Axes: R rows, N rows that are handled together, V vocabulary, S tokens of context and query, T with
those of the answer so far.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from star_attention.hf.execution.sampling import highest
from star_attention.storage.transfers import send

_BY_SCORES = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Processors of transformers that look at a row's scores and nothing else."""


class Noise:
    """The random numbers of the answers to one query.

    Several answers share it, as rows of the stock `generate` do. They draw in the same steps, each
    its part of the numbers, whether or not the others have ended.

    Args:
        seed: seed of a generator of its own; None draws from torch's global one.
        answers: number of answers.
        device: where the scores are.
    """

    def __init__(self, seed: int | None, answers: int, device: torch.device) -> None:
        self.answers = answers
        self._generator = None
        if seed is not None:
            self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def is_global(self) -> bool:
        """True for numbers of torch's global generator."""
        return self._generator is None

    def fill(self, noise_NV: Tensor) -> None:
        """Draw the numbers of a step, of all answers."""
        noise_NV.exponential_(generator=self._generator)


class Text:
    """Context, query and answer so far of some rows, for processors and criteria that read them.

    Args:
        text_RS: the text before the answers.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(self, text_RS: Tensor, max_new_tokens: int) -> None:
        rows, self._tokens = text_RS.shape
        self._ids_RT = torch.cat([text_RS, text_RS.new_empty(rows, max_new_tokens)], 1)

    def seen(self) -> Tensor:
        """Return the tokens so far, `[R, T]`."""
        return self._ids_RT[:, : self._tokens]

    def add(self, tokens_R: Tensor) -> None:
        """Append the drawn token of each row."""
        self._ids_RT[:, self._tokens] = tokens_R
        self._tokens += 1


def seen(text: Text | None, scores_RV: Tensor) -> Tensor:
    """Return the tokens so far of the rows of scores, `[R, T]`; none where nothing reads them."""
    if text is None:
        return scores_RV.new_empty(len(scores_RV), 0, dtype=torch.int64)
    return text.seen()


@dataclass(kw_only=True, eq=False)
class RowDraw:
    """How the tokens of one row are drawn.

    Attributes:
        processors: transformers' logits processors.
        criteria: its stopping criteria, without those of length and of end-of-sequence tokens.
        noise: random numbers for sampling; None for the most likely token.
        number: the row's number among the answers that share `noise`.
        text: context, query and answer so far, where processors or criteria read it; None
            elsewhere.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    noise: Noise | None = None
    number: int = 0
    text: Text | None = None
    shared_key: Hashable | None = field(init=False)
    """What rows have in common whose processors run in one call; None for a row of its own."""

    def __post_init__(self) -> None:
        self.shared_key = scores_key(self.processors)

    @property
    def reads_text(self) -> bool:
        """True if processors or criteria look at the tokens before the next one."""
        return bool(self.criteria) or self.shared_key is None


def scores_key(processors: Sequence[Any]) -> Hashable | None:
    """Return what equal processors have in common; None if some look at more than scores."""
    parts: list[Hashable] = []
    for processor in processors:
        if getattr(processor, "reads_scores_only", False):
            parts.append(id(processor))
        elif type(processor) in _BY_SCORES:
            values = vars(processor)
            if not all(isinstance(value, int | float) for value in values.values()):
                return None
            parts.append((type(processor), *sorted(values.items())))
        else:
            return None
    return tuple(parts)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The tokens of one step.

    Attributes:
        tokens_R: the token of each row, int64.
        ended_R: 1 for rows that a criterion ends, int64.
        failures: exceptions of rows whose processors or criteria raised one; their tokens mean
            nothing.
    """

    tokens_R: Tensor
    ended_R: Tensor
    failures: dict[int, Exception]


@torch.no_grad()
def draw(logits_RV: Tensor, rows: Sequence[RowDraw]) -> Drawn:
    """Draw the next token of each row, without waiting for the device.

    Args:
        logits_RV: unprocessed logits, fp32; they stay as they are.
        rows: how each row is drawn.
    """
    failures: dict[int, Exception] = {}
    scores_RV = _processed(logits_RV, rows, failures)
    tokens_R = _chosen(scores_RV, rows)
    ended_R = torch.zeros_like(tokens_R)
    for number, row in enumerate(rows):
        if number in failures:
            continue
        if row.text is not None:
            row.text.add(tokens_R[number])
        if row.criteria:
            scores_1V = scores_RV[number : number + 1]
            try:
                ended_R[number : number + 1] = row.criteria(seen(row.text, scores_1V), scores_1V)
            except Exception as error:
                # A user's criterion may raise anything, which ends its row alone.
                failures[number] = error
    return Drawn(tokens_R=tokens_R, ended_R=ended_R, failures=failures)


def _processed(
    logits_RV: Tensor, rows: Sequence[RowDraw], failures: dict[int, Exception]
) -> Tensor:
    """Return the scores after each row's processors."""
    together: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        if row.processors:
            key = number if row.shared_key is None else row.shared_key
            together.setdefault(key, []).append(number)
    if not together:
        return logits_RV
    scores_RV = logits_RV.clone()
    for numbers in together.values():
        row = rows[numbers[0]]
        at_N = send(numbers, logits_RV.device)
        part_NV = logits_RV[at_N]
        try:
            scores_RV[at_N] = row.processors(seen(row.text, part_NV), part_NV)
        except Exception as error:
            # So may a user's processor.
            failures |= dict.fromkeys(numbers, error)
    return scores_RV


def _chosen(scores_RV: Tensor, rows: Sequence[RowDraw]) -> Tensor:
    """Return a token of each row, `[R]`: the most likely, or a sample."""
    sampled = [number for number, row in enumerate(rows) if row.noise is not None]
    if not sampled:
        return highest(scores_RV)
    at_N = send(sampled, scores_RV.device)
    probabilities_NV = torch.softmax(scores_RV[at_N], -1)
    # What `multinomial` does for each row alone, with one division and argmax for all.
    ratios_RV = scores_RV.clone()
    ratios_RV[at_N] = probabilities_NV / _noise_of(probabilities_NV, [rows[n] for n in sampled])
    return highest(ratios_RV)


def _noise_of(like_NV: Tensor, rows: Sequence[RowDraw]) -> Tensor:
    noise_NV = torch.empty_like(like_NV)
    if any(row.noise is not None and row.noise.is_global for row in rows):
        # One call for all of these; what it draws for the others is drawn again.
        noise_NV.exponential_()
    shared: dict[Noise, Tensor] = {}
    for at, row in enumerate(rows):
        noise = row.noise
        assert noise is not None
        if noise.is_global:
            continue
        if noise.answers == 1:
            noise.fill(noise_NV[at : at + 1])
            continue
        if noise not in shared:
            shared[noise] = like_NV.new_empty(noise.answers, like_NV.shape[1])
            noise.fill(shared[noise])
        noise_NV[at] = shared[noise][row.number]
    return noise_NV
