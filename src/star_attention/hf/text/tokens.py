"""Text in and out: token ids of contexts and queries, text from tokens one at a time, and stopping at strings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def context_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a context: the tokenizer's defaults, so that BOS stands where the model expects it, once, and no EOS ends it."""
    ids: list[int] = tokenizer(text, verbose=False).input_ids  # (what is too long is said by us)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]  # the text brought its own
    if (
        eos is not None
        and eos != bos
        and ids
        and ids[-1] == eos
        and not text.endswith(tokenizer.eos_token)
    ):
        ids = ids[:-1]
    return ids


def query_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of what follows a context: no special tokens are added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; a piece never ends inside a character.

    Decodes from a little before the new tokens, because some tokenizers write a token differently at the start of a
    text, and holds back what ends in an unfinished byte sequence.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._read = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self._ids.append(token)
        before = decode(self._tokenizer, self._ids[self._start : self._read])
        now = decode(self._tokenizer, self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What was held back, for an answer that ends inside a character."""
        before = decode(self._tokenizer, self._ids[self._start : self._read])
        now = decode(self._tokenizer, self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return now[len(before) :]


def stop_tokens(tokenizer: Any, stops: list[str]) -> set[int]:
    """Ids of the stop strings that are special tokens, which an answer's text leaves out."""
    if tokenizer is None:
        return set()
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special |= {
        text: token
        for text, token in tokenizer.get_added_vocab().items()
        if tokenizer.decode([token]) == text
    }
    return {special[stop] for stop in stops if stop in special}


class StopText:
    """Cut a growing text before the first of some strings; text that may turn out to begin one is held back."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text so far that is certain and was not returned yet."""
        if self.stopped:
            return ""
        text = self._held + piece
        cuts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


class Answer:
    """One answer as it grows: token ids, text, and how it ended."""

    def __init__(self, tokenizer: Any, stops: list[str], eos_ids: set[int]) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.text = ""
        self._eos_ids = eos_ids
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopText(stops)

    def push(self, token: int) -> str:
        """Take one token; the text that became certain."""
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
        """No more tokens: the text that was held back. `reason` counts unless the answer has ended by itself."""
        self.finish_reason = self.finish_reason or reason
        piece = ""
        if self._detokenizer is not None and not self._stop.stopped:
            piece = self._stop.push(self._detokenizer.flush())
            piece += self._stop.flush()
        self.text += piece
        return piece


class StopStrings(StoppingCriteria):
    """Ends a row of transformers' own `generate` once its new text holds one of the strings (beams, assisted decoding)."""

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
