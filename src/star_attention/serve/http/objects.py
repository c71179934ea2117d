"""The objects of OpenAI's API, as JSON values."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from star_attention._version import __version__
from star_attention.generation.result import Generation, TokenLogprob


def new_id(prefix: str) -> str:
    """Return a random id."""
    return f"{prefix}{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Numbers of tokens.

    Attributes:
        prompt: of the prompt.
        answer: of all answers.
        cached: of the prompt, that were encoded before.
        written: of the prompt, that were encoded for this request and are kept.
        reasoning: True if reasoning was among the answers.
    """

    prompt: int
    answer: int
    cached: int = 0
    written: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the object; clients read its details, so that none is null."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {
                "cached_tokens": self.cached,
                "cache_write_tokens": self.written,
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What distinguishes the answers of `/v1/chat/completions` and `/v1/completions`.

    Attributes:
        model: the model's name, as it is served.
        id: id of the answer.
        created: its time, in seconds since 1970.
    """

    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))
    whole_kind: str = ""
    chunk_kind: str = ""

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"star-attention-{__version__}",
            "choices": choices,
        }

    def whole(self, answers: Sequence[Generation], usage: Usage) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        choices = [self.choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope(self.whole_kind, choices) | {"usage": usage.as_dict()}

    def chunk(
        self, choices: list[dict[str, Any]], usage: Usage | None, *, includes_usage: bool
    ) -> dict[str, Any]:
        """Return an event of a stream; without choices it is the last one, with the usage."""
        found = {"usage": None if usage is None else usage.as_dict()} if includes_usage else {}
        return self._envelope(self.chunk_kind, choices) | found

    def choice(self, index: int, answer: Generation) -> dict[str, Any]:
        """Return one of the answers."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first chunk's choice, which says that the answer begins."""
        raise NotImplementedError

    def piece(self, index: int, text: str, reasoning: str = "") -> dict[str, Any]:
        """Return a chunk's choice with text."""
        raise NotImplementedError

    def ending(self, index: int, answer: Generation) -> dict[str, Any]:
        """Return the last chunk's choice, with the reason."""
        raise NotImplementedError


class ChatShape(Shape):
    """Answers of `/v1/chat/completions`."""

    @classmethod
    def new(cls, model: str) -> ChatShape:
        return cls(
            model=model,
            id=new_id("chatcmpl-"),
            whole_kind="chat.completion",
            chunk_kind="chat.completion.chunk",
        )

    def choice(self, index: int, answer: Generation) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        return self._piece(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, reasoning: str = "") -> dict[str, Any]:
        delta = {"reasoning_content": reasoning} if reasoning else {}
        return self._piece(index, delta | ({"content": text} if text or not reasoning else {}))

    def ending(self, index: int, answer: Generation) -> dict[str, Any]:
        chunk = self._piece(index, {}) | {"finish_reason": answer.finish_reason}
        return chunk | {"logprobs": _chat_logprobs(answer.logprobs)}

    def _piece(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class TextShape(Shape):
    """Answers of `/v1/completions`."""

    @classmethod
    def new(cls, model: str) -> TextShape:
        return cls(
            model=model,
            id=new_id("cmpl-"),
            whole_kind="text_completion",
            chunk_kind="text_completion",
        )

    def choice(self, index: int, answer: Generation) -> dict[str, Any]:
        return self._piece(index, answer.text, answer.finish_reason, answer.logprobs)

    def opening(self, index: int) -> dict[str, Any]:
        return self._piece(index, "")

    def piece(self, index: int, text: str, reasoning: str = "") -> dict[str, Any]:
        return self._piece(index, text)

    def ending(self, index: int, answer: Generation) -> dict[str, Any]:
        return self._piece(index, "", answer.finish_reason, answer.logprobs)

    def _piece(
        self,
        index: int,
        text: str,
        reason: str | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": _text_logprobs(logprobs),
            "finish_reason": reason,
        }


def _chat_logprobs(logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {
        "content": [
            _token(each) | {"top_logprobs": [_token(other) for other in each.top]}
            for each in logprobs
        ],
        "refusal": None,
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": token.logprob,
        "bytes": list(token.token.encode(errors="replace")),
    }


def _text_logprobs(logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    offsets, at = [], 0
    for each in logprobs:
        offsets.append(at)
        at += len(each.token)
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{other.token: other.logprob for other in each.top} for each in logprobs],
        "text_offset": offsets,
    }
