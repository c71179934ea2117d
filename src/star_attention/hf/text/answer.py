"""The text of an answer while its tokens come: whole characters, and the strings that end it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from star_attention.hf.text.endings import stop_tokens
from star_attention.hf.text.tokens import decode

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Convert tokens to text one at a time; no piece of text ends inside a character.

    Each piece is decoded together with a few earlier tokens, because some tokenizers write a token
    differently at the start of a text. Incomplete byte sequences are held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._read = 0

    def push(self, token: int) -> str:
        """Add a token, and return the text that it completes, which may be empty."""
        self._ids.append(token)
        before = decode(self._tokenizer, self._ids[self._start : self._read])
        now = decode(self._tokenizer, self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """Return the text held back, for an answer that ends inside a character."""
        before = decode(self._tokenizer, self._ids[self._start : self._read])
        now = decode(self._tokenizer, self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return now[len(before) :]


class StopStringCutter:
    """Cut a growing text before the first stop string.

    The end of the text is held back while it may be the beginning of a stop string.

    Attributes:
        stopped: True once a stop string was found.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._pending = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add a piece, and return the text that is now certain to precede any stop string."""
        if self.stopped:
            return ""
        text = self._pending + piece
        cuts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped, self._pending = True, ""
            return text[: min(cuts)]
        pending = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - pending :]
        return text[: len(text) - pending]

    def flush(self) -> str:
        """Return the text held back."""
        pending, self._pending = self._pending, ""
        return pending


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


class AnswerText:
    """One answer while it is generated.

    Args:
        tokenizer: a transformers tokenizer; None generates ids without text.
        stops: strings that end the answer and are not part of its text.
        eos_ids: token ids that end the answer.

    Attributes:
        token_ids: all tokens so far.
        text: the text that is certain so far.
        finish_reason: why the answer ended, None while it continues.
    """

    def __init__(self, tokenizer: Any, stops: list[str], eos_ids: set[int]) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.text = ""
        self._eos_ids = eos_ids
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStringCutter(stops)

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now certain."""
        assert self.finish_reason is None, "the answer has ended"
        self.token_ids.append(token)
        if token in self._eos_ids:
            self.finish_reason = "stop"
        piece = "" if self._detokenizer is None else self._stop.push(self._detokenizer.push(token))
        self.text += piece
        if self._stop.stopped:
            self.finish_reason = "stop"
        return piece + self.end("stop") if self.finish_reason is not None else piece

    def end(self, reason: str) -> str:
        """End the answer, for `reason` unless it has ended already; return the text held back."""
        self.finish_reason = self.finish_reason or reason
        piece = ""
        if self._detokenizer is not None and not self._stop.stopped:
            piece = self._stop.push(self._detokenizer.flush())
            piece += self._stop.flush()
        self.text += piece
        return piece


class BeamStopCriteria(StoppingCriteria):
    """End rows of transformers' own `generate` at stop strings (beams, assisted decoding).

    Args:
        tokenizer: a transformers tokenizer.
        stops: strings that end a row.
        prompt_tokens: tokens of the prompt, which are not searched.
    """

    def __init__(self, tokenizer: Any, stops: list[str], prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens = stop_tokens(tokenizer, stops)
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self._prompt_tokens :].tolist()
        ended = [
            not self._tokens.isdisjoint(row)
            or any(stop in decode(self._tokenizer, row) for stop in self._stops)
            for row in rows
        ]
        return torch.tensor(ended, device=input_ids.device)
