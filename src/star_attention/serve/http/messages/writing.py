"""Answers of `/v1/messages`: objects, and events in their order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from star_attention.serve.http.blocks import REASONING, BlockShape
from star_attention.serve.http.events import named_event
from star_attention.serve.http.objects import Usage, new_id
from star_attention.serve.http.problems import Problem, anthropic_envelope
from star_attention.serve.http.tools import Answer, Call

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessageShape(BlockShape):
    """The answer of one request.

    Args:
        model: the model's name, as it is served.
        long_lived: True if what is written to the cache is to be kept for an hour or longer.
    """

    def __init__(self, model: str, *, long_lived: bool) -> None:
        super().__init__()
        self._long_lived = long_lived
        self._message: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def whole(
        self, answers: Sequence[Answer], usage: Usage, more: dict[str, Any]
    ) -> dict[str, Any]:
        (answer,) = answers
        self.take_citations(more)
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.text or not answer.calls:
            citations = self.citations or None
            content.append({"type": "text", "text": answer.text, "citations": citations})
        content += [_tool_use(call, json.loads(call.arguments)) for call in answer.calls]
        ended = {"content": content, "usage": self._usage(usage)}
        return self._message | ended | _stop(answer) | more

    def opening(self, answers: int, usage: Usage) -> bytes:
        message = self._message | {"usage": self._usage(usage)}
        return named_event({"type": "message_start", "message": message}) + self.beat(None)

    def beat(self, progress: dict[str, Any] | None) -> bytes:
        return named_event({"type": "ping", **({"star": progress} if progress else {})})

    def begin_block(self) -> bytes:
        block = (
            {"type": "thinking", "thinking": "", "signature": ""}
            if self.kind == REASONING
            else {"type": "text", "text": "", "citations": None}
        )
        return self._event("content_block_start", content_block=block)

    def add(self, text: str) -> bytes:
        delta = (
            {"type": "thinking_delta", "thinking": text}
            if self.kind == REASONING
            else {"type": "text_delta", "text": text}
        )
        return self._event("content_block_delta", delta=delta)

    def citation(self, source: dict[str, Any], star: dict[str, Any]) -> dict[str, Any] | None:
        document = source.get("document")
        if document is None:
            return None
        start, end = document["start"], document["end"]
        return {
            "type": "char_location",
            "cited_text": source["text"][: end - start],
            "document_index": document["index"],
            "document_title": document.get("name"),
            "start_char_index": start,
            "end_char_index": end,
            "file_id": document.get("file_id"),
        }

    def cite(self, number: int) -> bytes:
        delta = {"type": "citations_delta", "citation": self.citations[number]}
        return self._event("content_block_delta", delta=delta)

    def end_block(self) -> bytes:
        return self._event("content_block_stop")

    def call(self, call: Call) -> bytes:
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        return (
            self._event("content_block_start", content_block=_tool_use(call, {}))
            + self._event("content_block_delta", delta=delta)
            + self._event("content_block_stop")
        )

    def closing(self, usage: Usage) -> bytes:
        assert self.answer is not None, "the answer has ended"
        last = {
            "type": "message_delta",
            "delta": _stop(self.answer),
            "usage": self._usage(usage),
            **self.more,
        }
        return named_event(last) + named_event({"type": "message_stop"})

    def failure(self, problem: Problem, request_id: str) -> bytes:
        return named_event(anthropic_envelope(problem, request_id))

    def _event(self, kind: str, **fields: Any) -> bytes:
        return named_event({"type": kind, "index": self.number, **fields})

    def _usage(self, usage: Usage) -> dict[str, Any]:
        """Return the tokens; those of the prompt are counted in one of three numbers."""
        written = {"ephemeral_5m_input_tokens": usage.written, "ephemeral_1h_input_tokens": 0}
        if self._long_lived:
            written = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": usage.written}
        return {
            "input_tokens": usage.prompt - usage.cached - usage.written,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": usage.written,
            "cache_creation": written,
            "output_tokens": usage.answer,
        }


def _tool_use(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _stop(answer: Answer) -> dict[str, Any]:
    """Return why an answer has ended."""
    if answer.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_string}
    reason = _REASONS.get(answer.finish_reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}
