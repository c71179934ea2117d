"""The text of an answer while its tokens come, and what ends it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria

from star_attention.hf.text.endings import stop_tokens
from star_attention.hf.text.reasoning import Markup, ReasoningReader, answer_reader
from star_attention.hf.text.stops import StopStringCutter, StopStrings
from star_attention.hf.text.tokens import decode


class Reader(Protocol):
    """Converts the tokens of an answer to its text."""

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now certain."""

    def flush(self) -> str:
        """Return the text held back."""


class Reading:
    """How the answers of one call are read.

    Args:
        tokenizer: a transformers tokenizer; None generates ids without text.
        stops: strings that end an answer and are not part of its text.
        answer_prefix: text that every answer was made to begin with.
        skip_special_tokens: leave special tokens out of the text, and keep a model's reasoning
            apart; False keeps everything as the model writes it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: list[str],
        answer_prefix: str = "",
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer, self._answer_prefix = tokenizer, answer_prefix
        self._skip_special_tokens = skip_special_tokens
        reads_markup = tokenizer is not None and skip_special_tokens
        self.markup = Markup.of(tokenizer) if reads_markup else None
        self.stops = StopStrings(stops)
        self.stop_tokens = stop_tokens(tokenizer, stops)
        # Of an end that a checkpoint does not mark as special, decoding would show the text.
        added = tokenizer is not None and skip_special_tokens
        self.added_tokens = frozenset(tokenizer.added_tokens_decoder if added else ())

    def reader(self, prompt: list[int]) -> Reader | None:
        """Return what reads the answer to a prompt of these tokens; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return answer_reader(
            self._tokenizer,
            self.markup,
            prompt,
            self._answer_prefix,
            skip_special_tokens=self._skip_special_tokens,
        )

    def stops_in(self, prompt: list[int], answer: list[int]) -> bool:
        """True if the text of an answer, whose last token is new, holds a stop string."""
        if not self.stop_tokens.isdisjoint(answer):
            return True
        if self.markup is None:
            # It was searched after each earlier token. A token adds a byte at least, and a
            # character has four at most.
            ids = answer[-(4 * self.stops.longest + 16) :]
            text = decode(self._tokenizer, ids, skip_special_tokens=self._skip_special_tokens)
        else:
            reader = answer_reader(self._tokenizer, self.markup, prompt, self._answer_prefix)
            text = "".join([*map(reader.push, answer), reader.flush()])
        cutter = StopStringCutter(self.stops)
        cutter.push(text)
        return cutter.stopped


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How the answers of one call become text, in words that travel between ranks.

    Attributes:
        stops, answer_prefix, skip_special_tokens: see `Reading`.
        eos_ids: token ids that end an answer.
    """

    stops: list[str]
    answer_prefix: str
    skip_special_tokens: bool
    eos_ids: set[int]

    def reading(self, tokenizer: Any) -> Reading:
        """Return how a tokenizer's tokens are read."""
        return Reading(
            tokenizer,
            self.stops,
            self.answer_prefix,
            skip_special_tokens=self.skip_special_tokens,
        )

    def answers(self, reading: Reading, prompts: list[list[int]]) -> list[AnswerText]:
        """Return an empty answer to each prompt."""
        eos_ids = self.eos_ids | reading.stop_tokens
        silent_ids = eos_ids & reading.added_tokens
        return [
            AnswerText(reading.reader(prompt), reading.stops, eos_ids, silent_ids)
            for prompt in prompts
        ]


class AnswerText:
    """One answer while it is generated.

    Args:
        reader: converts its tokens to text, or None.
        stops: strings that end it.
        eos_ids: token ids that end it.
        silent_ids: those of them that have no part in the text.

    Attributes:
        token_ids: all tokens so far.
        finish_reason: why the answer ended, None while it continues.
    """

    def __init__(
        self,
        reader: Reader | None,
        stops: StopStrings,
        eos_ids: set[int],
        silent_ids: Collection[int] = (),
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._pieces: list[str] = []
        self._eos_ids, self._silent_ids = eos_ids, silent_ids
        self._reader = reader
        self._stop = StopStringCutter(stops)

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._pieces)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer; None for another reason."""
        return self._stop.string

    @property
    def is_unsaid(self) -> bool:
        """True if it has tokens, but none with a text: special tokens, reasoning, a tool's call.

        A single token is asked for to look at its logits or to measure, and does not count.
        """
        is_cut = self._stop.stopped or set(self.token_ids) <= self._eos_ids
        return len(self.token_ids) > 1 and not (self._reader is None or is_cut or self.text)

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far, if the model marks any."""
        return self._reader.reasoning if isinstance(self._reader, ReasoningReader) else None

    @property
    def reasoning_tokens(self) -> int:
        """The tokens that the reasoning took so far, with its marks."""
        return self._reader.reasoning_tokens if isinstance(self._reader, ReasoningReader) else 0

    def take_reasoning(self) -> str:
        """Return the reasoning since the last call."""
        return self._reader.take_reasoning() if isinstance(self._reader, ReasoningReader) else ""

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now certain."""
        assert self.finish_reason is None, "the answer has ended"
        self.token_ids.append(token)
        if token in self._eos_ids:
            self.finish_reason = "stop"
        piece = ""
        if self._reader is not None and token not in self._silent_ids:
            piece = self._stop.push(self._reader.push(token))
        self._pieces.append(piece)
        if self._stop.stopped:
            self.finish_reason = "stop"
        return piece + self.end("stop") if self.finish_reason is not None else piece

    def end(self, reason: str) -> str:
        """End the answer, for `reason` unless it has ended already; return the text held back."""
        self.finish_reason = self.finish_reason or reason
        piece = ""
        if self._reader is not None and not self._stop.stopped:
            piece = self._stop.push(self._reader.flush())
            piece += self._stop.flush()
        self._pieces.append(piece)
        return piece


class BeamStopCriteria(StoppingCriteria):
    """End rows of transformers' own `generate` at stop strings (beams, assisted decoding).

    Args:
        reading: how the answers are read.
        prompt_tokens: tokens of the prompt, which are not searched.
    """

    def __init__(self, reading: Reading, prompt_tokens: int) -> None:
        self._reading = reading
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended = [
            self._reading.stops_in(row[: self._prompt_tokens], row[self._prompt_tokens :])
            for row in input_ids.tolist()
        ]
        return torch.tensor(ended, device=input_ids.device)
