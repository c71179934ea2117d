"""Tools of a request: what the chat template gets, and the calls in an answer."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from star_attention.engine import StarLLM
from star_attention.errors import quote
from star_attention.generation.result import Generation, TokenLogprob
from star_attention.hf.text.call_forms import Form, call_form
from star_attention.hf.text.calls import CallHolder, ToolCall
from star_attention.hf.text.tool_reader import (
    CHOICES,
    NO_FORM,
    ToolReader,
    forced_of,
    functions_of,
    no_such_tool,
    schemas,
)
from star_attention.serve.http.body import Body, wrong_type
from star_attention.serve.http.problems import bad_request, not_supported

MOST_TOOLS = 128
_ID_CHARACTERS = 9
"""Characters of an id: Mistral's templates take no others."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The tools of a request.

    Attributes:
        given: the tools, in the form of a chat.
        choice: "auto", "required", or the name of the one to call.
        is_single: True for at most one call.
    """

    given: list[dict[str, Any]]
    choice: str = "auto"
    is_single: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the tools."""
        return [tool["function"]["name"] for tool in self.given]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool, with a name of its own.

    Attributes:
        id: its id.
        name: the tool's name.
        arguments: an object, as JSON.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:_ID_CHARACTERS])
    name: str
    arguments: str

    @classmethod
    def of(cls, call: ToolCall) -> Call:
        return cls(name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False))

    def as_dict(self) -> dict[str, Any]:
        """Return the call in the form of a chat."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer as it is written: what it says, and what it calls.

    Attributes:
        text, reasoning, stop_string, logprobs: those of the generation, without calls.
        finish_reason: "tool_calls" for an answer that ends in calls.
        calls: the calls.
    """

    text: str
    reasoning: str | None
    finish_reason: str
    stop_string: str | None
    logprobs: list[TokenLogprob] | None
    calls: tuple[Call, ...] = ()

    @classmethod
    def of(
        cls, result: Generation, text: str | None = None, calls: tuple[Call, ...] = ()
    ) -> Answer:
        """Return a generation with its calls."""
        is_call = bool(calls) and result.finish_reason == "stop"
        return cls(
            text=result.text if text is None else text,
            reasoning=result.reasoning,
            finish_reason="tool_calls" if is_call else result.finish_reason,
            stop_string=result.stop_string,
            logprobs=result.logprobs,
            calls=calls,
        )

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat."""
        content = None if self.calls and not self.text else self.text
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call.as_dict() for call in self.calls]
        return message


class CallReader:
    """Reads the calls in the answers to one request.

    Args:
        tools: the request's.
        form: how the model writes calls.
    """

    def __init__(self, tools: Tools, form: Form) -> None:
        self._tools, self._form = tools, form

    @property
    def grammar(self) -> dict[str, Any] | None:
        """What an answer that has to be a call follows; None where none has to be one."""
        return self._reader(None).grammar

    def holder(self) -> CallHolder:
        """Return what holds calls back from the text of an answer."""
        return self._reader(None).holder()

    def calls(self, star: StarLLM, result: Generation) -> tuple[Call, ...]:
        """Return the calls of an answer.

        Args:
            star: an engine whose tokenizer may be used.
            result: the answer.
        """
        has_reasoning = result.reasoning is not None
        found = self._reader(star.tokenizer).calls(
            result.text, result.token_ids, has_reasoning=has_reasoning
        )
        return tuple(map(Call.of, found[:1] if self._tools.is_single else found))

    def _reader(self, tokenizer: Any) -> ToolReader:
        functions = functions_of(self._tools.given)
        return ToolReader(
            form=self._form,
            schemas=schemas(functions),
            tokenizer=tokenizer,
            forced=forced_of(self._tools.choice, functions),
        )


def read_tools(body: Body) -> Tools | None:
    """Take the tools of a chat; None for a request without any, or one that is to call none.

    Raises:
        Problem: something else than functions, or a choice that is none of them.
    """
    given = body.take("tools", [])
    single = body.take("parallel_tool_calls", True) is False
    if not isinstance(given, list) or len(given) > MOST_TOOLS:
        raise wrong_type(body.name("tools"), given, f"a list of up to {MOST_TOOLS} tools")
    own = [tool for tool in given if not _is_search(tool)]
    if own and len(own) < len(given):
        # Programs that write code send it with every request. A model need not search.
        body.fields["web_search"] = True
        given = own
    tools = [_tool(tool, body.name("tools")) for tool in given]
    if not tools:
        # A choice without tools is refused with the other fields.
        return None
    names = [tool["function"]["name"] for tool in tools]
    choice = _choice(body, names)
    return None if choice == "none" else Tools(given=tools, choice=choice, is_single=single)


def reader_of(tools: Tools, tokenizer: Any, name: str) -> CallReader:
    """Return what reads the calls of answers.

    Args:
        tools: the request's.
        tokenizer: the model's.
        name: what the client calls the field of tools.

    Raises:
        Problem: the model's chat template takes no tools, or writes calls in an unknown form.
    """
    form = call_form(tokenizer)
    if form is None:
        raise not_supported(name, quote(tools.names), f"{NO_FORM}; leave them out")
    return CallReader(tools, form)


def _is_search(tool: Any) -> bool:
    """True for the search of a server that has one."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and kind.startswith("web_search")


def _tool(tool: Any, name: str) -> dict[str, Any]:
    kind = tool.get("type", "function") if isinstance(tool, dict) else None
    function = tool.get("function") if isinstance(tool, dict) else None
    if kind != "function":
        raise not_supported(name, f"of type {quote(kind)}", "give tools of type function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        # As the tools of /v1/responses are written.
        remedy = "put its name and parameters into an object `function`"
        remedy = remedy if "name" in tool else "give one"
        raise bad_request(f"{name} has a tool whose function has no name; {remedy}", name)
    schema = function.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise wrong_type(f"{name}.parameters", schema, "a JSON schema")
    plain = {key: value for key, value in function.items() if value is not None and key != "strict"}
    return {"type": "function", "function": plain}


def _choice(body: Body, names: list[str]) -> str:
    choice = body.take("tool_choice", "auto")
    if choice in CHOICES:
        return str(choice)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise bad_request(no_such_tool(choice, names), "tool_choice")
    return str(name)
