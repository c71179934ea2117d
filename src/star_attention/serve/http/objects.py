"""How answers are written: the forms of all protocols, and those of OpenAI's chat."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from star_attention._version import __version__
from star_attention.generation.result import Delta, TokenLogprob
from star_attention.serve.http.events import DONE, encoded, event
from star_attention.serve.http.problems import Problem
from star_attention.serve.http.tools import Answer

_MARK = "a piece of an answer"
"""Stands for one, to find its place in a chunk."""


def new_id(prefix: str) -> str:
    """Return a random id."""
    return f"{prefix}{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Numbers of tokens.

    Attributes:
        prompt: of the prompt.
        answer: of all answers.
        reasoning: of these, those that the model's reasoning took, once an answer has ended.
        cached: of the prompt, that were encoded before.
        written: of the prompt, that were encoded for this request and are kept.
    """

    prompt: int
    answer: int
    reasoning: int = 0
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
                "reasoning_tokens": self.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


class Shape:
    """How the answers of one request are written, as a whole or as the events of a stream."""

    def whole(
        self, answers: Sequence[Answer], usage: Usage, more: dict[str, Any]
    ) -> dict[str, Any]:
        """Return answers that are not streamed, with further fields."""
        raise NotImplementedError

    def opening(self, answers: int, usage: Usage) -> bytes:
        """Return the first events of a stream with so many answers."""
        raise NotImplementedError

    def piece(self, index: int, delta: Delta) -> bytes:
        """Return events with what an answer goes on with."""
        raise NotImplementedError

    def ending(self, index: int, answer: Answer, more: dict[str, Any]) -> bytes:
        """Return events that say that and why an answer has ended, with further fields."""
        raise NotImplementedError

    def beat(self, progress: dict[str, Any] | None) -> bytes:
        """Return an event without text, for clients that count only these.

        Args:
            progress: how far the context is; None if nobody has asked for it.
        """
        raise NotImplementedError

    def closing(self, usage: Usage) -> bytes:
        """Return the last events, after all answers."""
        raise NotImplementedError

    def failure(self, problem: Problem, request_id: str) -> bytes:
        """Return the last events where something has failed."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ChoicesShape(Shape):
    """What `/v1/chat/completions` and `/v1/completions` share.

    Attributes:
        model: the model's name, as it is served.
        id: id of the answer.
        created: its time, in seconds since 1970.
        includes_usage: True for a last chunk with the usage.
    """

    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))
    includes_usage: bool = False
    whole_kind: str = ""
    chunk_kind: str = ""
    _around: dict[int, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)

    def whole(
        self, answers: Sequence[Answer], usage: Usage, more: dict[str, Any]
    ) -> dict[str, Any]:
        choices = [self.choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope(self.whole_kind, choices) | {"usage": usage.as_dict()} | more

    def opening(self, answers: int, usage: Usage) -> bytes:
        return b"".join(self._chunk(self.first(index)) for index in range(answers))

    def piece(self, index: int, delta: Delta) -> bytes:
        if delta.reasoning:
            return self._chunk(self.more(index, delta))
        # All of it but the text is the same in every piece of an answer.
        if index not in self._around:
            chunk = self._chunk(self.more(index, Delta(text=_MARK)))
            before, mark, after = chunk.rpartition(encoded(_MARK))
            assert mark, "a chunk has its text"
            self._around[index] = before, after
        before, after = self._around[index]
        return before + encoded(delta.text) + after

    def ending(self, index: int, answer: Answer, more: dict[str, Any]) -> bytes:
        calls = b"".join(self._chunk(each) for each in self.calls(index, answer))
        return calls + self._chunk(self.last(index, answer), **more)

    def beat(self, progress: dict[str, Any] | None) -> bytes:
        return self._chunk(self.more(0, Delta()), **({"star": progress} if progress else {}))

    def closing(self, usage: Usage) -> bytes:
        return (self._chunk(usage=usage.as_dict()) if self.includes_usage else b"") + DONE

    def failure(self, problem: Problem, request_id: str) -> bytes:
        return event(problem.envelope) + DONE

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"star-attention-{__version__}",
            "choices": choices,
        }

    def _chunk(self, *choices: dict[str, Any], **more: Any) -> bytes:
        usage = {"usage": None} if self.includes_usage else {}
        return event(self._envelope(self.chunk_kind, list(choices)) | usage | more)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return one of the answers."""
        raise NotImplementedError

    def first(self, index: int) -> dict[str, Any]:
        """Return the first chunk's choice, which says that the answer begins."""
        raise NotImplementedError

    def more(self, index: int, delta: Delta) -> dict[str, Any]:
        """Return a chunk's choice with text."""
        raise NotImplementedError

    def calls(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """Return the choices of chunks with the calls of an answer."""
        return []

    def last(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the last chunk's choice, with the reason."""
        raise NotImplementedError


class ChatShape(ChoicesShape):
    """Answers of `/v1/chat/completions`."""

    @classmethod
    def new(cls, model: str, includes_usage: bool) -> ChatShape:
        return cls(
            model=model,
            includes_usage=includes_usage,
            id=new_id("chatcmpl-"),
            whole_kind="chat.completion",
            chunk_kind="chat.completion.chunk",
        )

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": answer.message | {"refusal": None},
            "logprobs": _chat_logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }

    def first(self, index: int) -> dict[str, Any]:
        return self._piece(index, {"role": "assistant", "content": ""})

    def more(self, index: int, delta: Delta) -> dict[str, Any]:
        fields = {"reasoning_content": delta.reasoning} if delta.reasoning else {}
        if delta.text or not fields:
            fields["content"] = delta.text
        return self._piece(index, fields)

    def calls(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        return [
            self._piece(index, {"tool_calls": [{"index": number, **call.as_dict()}]})
            for number, call in enumerate(answer.calls)
        ]

    def last(self, index: int, answer: Answer) -> dict[str, Any]:
        chunk = self._piece(index, {}) | {"finish_reason": answer.finish_reason}
        return chunk | {"logprobs": _chat_logprobs(answer.logprobs)}

    def _piece(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class TextShape(ChoicesShape):
    """Answers of `/v1/completions`."""

    @classmethod
    def new(cls, model: str, includes_usage: bool) -> TextShape:
        return cls(
            model=model,
            includes_usage=includes_usage,
            id=new_id("cmpl-"),
            whole_kind="text_completion",
            chunk_kind="text_completion",
        )

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._piece(index, answer.text, answer.finish_reason, answer.logprobs)

    def first(self, index: int) -> dict[str, Any]:
        return self._piece(index, "")

    def more(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._piece(index, delta.text)

    def last(self, index: int, answer: Answer) -> dict[str, Any]:
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
    return {"content": logprob_objects(logprobs), "refusal": None}


def logprob_objects(logprobs: list[TokenLogprob] | None) -> list[dict[str, Any]]:
    """Return the tokens of an answer with their probabilities; none if nobody has asked."""
    return [
        _token(each) | {"top_logprobs": [_token(other) for other in each.top]}
        for each in logprobs or ()
    ]


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
