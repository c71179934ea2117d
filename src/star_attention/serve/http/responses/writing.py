"""Answers of `/v1/responses`: objects, and events in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from star_attention.serve.http.blocks import REASONING, TEXT, BlockShape
from star_attention.serve.http.events import named_event
from star_attention.serve.http.objects import Usage, logprob_objects, new_id
from star_attention.serve.http.problems import Problem
from star_attention.serve.http.responses.reading import own_names
from star_attention.serve.http.tools import Answer, Call

CANCELLED = "response_cancelled"
"""The code of a response that its client has canceled."""


class ResponseShape(BlockShape):
    """The answer of one request.

    Args:
        model: the model's name, as it is served.
        echo: fields of the request that come back.

    Attributes:
        response: the response as it is now.
        on_end: called with the answer once it has ended; None where it has failed.
    """

    def __init__(self, model: str, echo: dict[str, Any]) -> None:
        super().__init__()
        self.on_end: Callable[[Answer | None], None] = lambda answer: None
        self.response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            **echo,
        }
        self._own_names = own_names(echo.get("tools"))
        self._sequence = 0
        self._item_id = ""

    # ------------------------------------------------------------------------------- whole

    def whole(
        self, answers: Sequence[Answer], usage: Usage, more: dict[str, Any]
    ) -> dict[str, Any]:
        (answer,) = answers
        self.take_citations(more)
        output = []
        if answer.reasoning:
            part = self._part(REASONING, answer.reasoning, None)
            output.append(_item(REASONING, new_id("rs_"), part, None, ended=True))
        if answer.text or not answer.calls:
            part = self._part(TEXT, answer.text, answer)
            output.append(_item(TEXT, new_id("msg_"), part, answer, ended=True))
        output += [self._call_item(call) for call in answer.calls]
        self.response["output"] = output
        return self._end(answer, usage) | more

    def _call_item(self, call: Call) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": new_id("fc_"),
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
            **self._own_names.get(call.name, {}),
        }

    def _end(self, answer: Answer, usage: Usage) -> dict[str, Any]:
        """Return the response, which ends with this answer."""
        is_cut = answer.finish_reason == "length"
        self.response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": _usage(usage),
        }
        self.on_end(answer)
        return self.response

    # ------------------------------------------------------------------------------- events

    def opening(self, answers: int, usage: Usage) -> bytes:
        return self._event("response.created", response=self.response) + self.beat(None)

    def beat(self, progress: dict[str, Any] | None) -> bytes:
        more = {"star": progress} if progress else {}
        return self._event("response.in_progress", response=self.response, **more)

    def begin_block(self) -> bytes:
        assert self.kind is not None, "a block begins"
        self._item_id = new_id("rs_" if self.kind == REASONING else "msg_")
        item = _item(self.kind, self._item_id, None, None, ended=False)
        return self._of_item("response.output_item.added", item=item) + self._of_part(
            "response.content_part.added", part=self._part(self.kind, "", None)
        )

    def add(self, text: str) -> bytes:
        if self.kind == REASONING:
            return self._of_part("response.reasoning_text.delta", delta=text)
        return self._of_part("response.output_text.delta", delta=text, logprobs=[])

    def citation(self, source: dict[str, Any], star: dict[str, Any]) -> dict[str, Any] | None:
        document = source.get("document", {})
        return {
            "type": "file_citation",
            "file_id": document.get("file_id", star["context"]),
            "filename": document.get("name", ""),
            "index": document.get("index", 0),
            "star": source,
        }

    def cite(self, number: int) -> bytes:
        return self._of_part(
            "response.output_text.annotation.added",
            annotation_index=number,
            annotation=self.citations[number],
        )

    def end_block(self) -> bytes:
        assert self.kind is not None, "a block ends"
        kind, text, answer = self.kind, self.written, self.answer
        part = self._part(kind, text, answer)
        item = _item(kind, self._item_id, part, answer, ended=True)
        self.response["output"] = [*self.response["output"], item]
        if kind == REASONING:
            events = self._of_part("response.reasoning_text.done", text=text)
        else:
            logprobs = part["logprobs"]
            events = self._of_part("response.output_text.done", text=text, logprobs=logprobs)
        events += self._of_part("response.content_part.done", part=part)
        return events + self._of_item("response.output_item.done", item=item)

    def call(self, call: Call) -> bytes:
        item = self._call_item(call)
        begun = item | {"arguments": "", "status": "in_progress"}
        arguments, id = call.arguments, item["id"]
        self.response["output"] = [*self.response["output"], item]
        kind = "response.function_call_arguments"
        return (
            self._of_item("response.output_item.added", item=begun)
            + self._of_item(f"{kind}.delta", item_id=id, delta=arguments)
            + self._of_item(f"{kind}.done", item_id=id, name=item["name"], arguments=arguments)
            + self._of_item("response.output_item.done", item=item)
        )

    def closing(self, usage: Usage) -> bytes:
        assert self.answer is not None, "the answer has ended"
        response = self._end(self.answer, usage) | self.more
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, problem: Problem, request_id: str) -> bytes:
        error = problem.envelope["error"]
        self.response |= {
            "status": "cancelled" if problem.code == CANCELLED else "failed",
            "error": {"code": error["code"], "message": error["message"]},
        }
        self.on_end(None)
        # Clients raise for the second one.
        return self._event("response.failed", response=self.response) + self._event(
            "error",
            code=error["code"],
            message=error["message"],
            param=error["param"],
            error=error,
        )

    def _part(self, kind: str, text: str, answer: Answer | None) -> dict[str, Any]:
        if kind == REASONING:
            return {"type": "reasoning_text", "text": text}
        logprobs = logprob_objects(answer.logprobs if answer is not None else None)
        annotations = self.citations
        return {
            "type": "output_text",
            "text": text,
            "annotations": annotations,
            "logprobs": logprobs,
        }

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, output_index=self.number, **fields)

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._of_item(kind, item_id=self._item_id, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        return named_event({"type": kind, "sequence_number": number, **fields})


def _item(
    kind: str, id: str, part: dict[str, Any] | None, answer: Answer | None, *, ended: bool
) -> dict[str, Any]:
    """Return an item of the output: a message, or the thoughts before it."""
    is_cut = answer is not None and answer.finish_reason == "length"
    status = ("incomplete" if is_cut else "completed") if ended else "in_progress"
    content = [] if part is None else [part]
    item = {"id": id, "status": status, "content": content}
    if kind == REASONING:
        return item | {"type": "reasoning", "summary": []}
    return item | {"type": "message", "role": "assistant"}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {
            "cached_tokens": usage.cached,
            "cache_write_tokens": usage.written,
        },
        "output_tokens": usage.answer,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.answer,
    }
