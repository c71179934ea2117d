"""Requests of `/v1/responses`, as those of a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.errors import quote
from star_attention.serve.http.body import Body, missing, wrong_type
from star_attention.serve.http.fields import refuse_fields, template_arguments
from star_attention.serve.http.problems import bad_request

NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
"""What the fields of a chat are called here."""

_REFUSED = {
    "conversation": "give previous_response_id",
    "logprobs": "give include message.output_text.logprobs",
    "max_completion_tokens": "give max_output_tokens",
    "max_tokens": "give max_output_tokens",
    "n": "ask once for each answer",
    "prompt": "give its text as input",
    "reasoning_effort": "give reasoning.effort",
    "response_format": "give text.format",
}
"""Fields that this protocol or this server has not, and what to do instead."""

_INPUT = "a text, or a list of items that is not empty"
_LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text")
_MARKS = ("prompt_cache_breakpoint", "cache_control")
_JOINT = "__"
"""Between the name of a namespace and that of a function in it."""
_ECHOED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "user": None,
}
"""Fields of a request that come back with its answer, and what they are without a value."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A request.

    Attributes:
        instructions: messages that come first, and that no next response inherits.
        messages: what is new.
        previous: id of the response that it continues; None for none.
        keeps: True if the response can be continued.
        fields: the other fields, as those of a chat.
        echo: fields that come back with the answer.
    """

    instructions: list[Any]
    messages: list[Any]
    previous: str | None
    keeps: bool
    fields: Body
    echo: dict[str, Any]


def read_request(
    body: Body, reads: Callable[[str], bool], item: Callable[[str], dict[str, Any]]
) -> Wanted:
    """Return what a request asks for.

    Args:
        body: the request.
        reads: tells whether the chat template reads an argument.
        item: returns the item of an earlier answer by its id.
    """
    refuse_fields(body, _REFUSED)
    echo = {name: body.fields.get(name, default) for name, default in _ECHOED.items()}
    instructions = body.text("instructions")
    previous = body.text("previous_response_id", most=100)
    keeps = body.flag("store", True)
    given = body.take("input")
    if given is None:
        raise missing("input", _INPUT, body, {"messages": "/v1/chat/completions"})
    messages = _messages(given, item)
    fields = body.fields
    if "max_output_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_output_tokens")
    _take_text(body)
    _take_tools(fields)
    _take_reasoning(body, reads)
    include = body.take("include", [])
    if not isinstance(include, list):
        raise wrong_type("include", include, "a list of strings")
    if _LOGPROBS in include or fields.get("top_logprobs"):
        fields["logprobs"] = True
    return Wanted(
        instructions=[{"role": "system", "content": instructions}] if instructions else [],
        messages=messages,
        previous=previous,
        keeps=keeps,
        fields=Body(fields, NAMES),
        echo=echo,
    )


def _take_text(body: Body) -> None:
    text = body.object("text")
    if text.get("verbosity") is not None:
        body.fields["verbosity"] = text["verbosity"]
    wanted = text.get("format")
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        raise wrong_type("text.format", wanted, "an object")
    if wanted.get("type") == "json_schema":
        wanted = {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    body.fields["response_format"] = wanted


def _take_tools(fields: dict[str, Any]) -> None:
    """Put tools and their choice into the form of a chat."""
    if isinstance(fields.get("tools"), list):
        fields["tools"] = [own for tool in fields["tools"] for own in _tools(tool)]
    choice = fields.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}


def _tools(tool: Any) -> list[Any]:
    """Return a tool as those of a chat: a namespace becomes its functions."""
    inner = _inner(tool)
    if inner is None:
        return [_tool(tool)]
    return [_tool({**each, "name": _joint_name(tool["name"], each["name"])}) for each in inner]


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    about = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": about}


def _inner(tool: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a namespace; None for a tool that is none."""
    inner = tool.get("tools") if isinstance(tool, dict) else None
    if not isinstance(inner, list) or tool.get("type") != "namespace":
        return None
    names = [tool.get("name"), *(each.get("name") for each in inner if isinstance(each, dict))]
    is_named = len(names) == len(inner) + 1 and all(isinstance(name, str) for name in names)
    return inner if is_named else None


def _joint_name(namespace: str, name: str) -> str:
    return f"{namespace}{_JOINT}{name}"


def own_names(tools: Any) -> dict[str, dict[str, str]]:
    """Return of each function in a namespace, by its name in a chat, its fields in a call."""
    spaces = [tool for tool in tools if _inner(tool)] if isinstance(tools, list) else []
    return {
        _joint_name(space["name"], each["name"]): {
            "namespace": space["name"],
            "name": each["name"],
        }
        for space in spaces
        for each in space["tools"]
    }


def _take_reasoning(body: Body, reads: Callable[[str], bool]) -> None:
    effort = body.object("reasoning").get("effort")
    if effort is not None:
        wanted = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        template_arguments(body, wanted, reads)


def _messages(value: Any, item: Callable[[str], dict[str, Any]]) -> list[Any]:
    """Return the messages of an input: a text, or a list of items."""
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise wrong_type("input", value, _INPUT)
    messages: list[Any] = []
    thoughts = ""
    for each in value:
        if isinstance(each, dict) and each.get("type") == "item_reference":
            each = item(str(each.get("id")))
        kind = each.get("type", "message") if isinstance(each, dict) else "message"
        if kind == "reasoning":
            thoughts = _thoughts(each)
        elif kind == "message":
            messages.append(_message(each, thoughts))
            thoughts = ""
        elif kind == "function_call":
            _add_call(messages, each, thoughts)
            thoughts = ""
        elif kind == "function_call_output":
            messages.append(_output(each))
        else:
            raise bad_request(
                f"input has an item of type {quote(kind)}, which is not supported; give its text"
                " in a message",
                "input",
                "unsupported_value",
            )
    return messages


def _add_call(messages: list[Any], item: dict[str, Any], thoughts: str) -> None:
    """Add a call to the message of the assistant that it belongs to."""
    name, namespace = item.get("name"), item.get("namespace")
    if isinstance(name, str) and isinstance(namespace, str):
        name = _joint_name(namespace, name)
    function = {"name": name, "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    if last.get("role") == "assistant" and not thoughts:
        messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", []), call]}
        return
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages.append(message | ({"reasoning_content": thoughts} if thoughts else {}))


def _output(item: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a call."""
    output = item.get("output")
    content = [_part(part) for part in output] if isinstance(output, list) else output
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}


def _thoughts(item: dict[str, Any]) -> str:
    content = item.get("content")
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _message(item: Any, thoughts: str) -> Any:
    if not isinstance(item, dict):
        return item
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    message = {"role": item.get("role"), "content": content}
    message |= {name: item[name] for name in _MARKS if name in item}
    return message | ({"reasoning_content": thoughts} if thoughts else {})


def _part(part: Any) -> Any:
    """Return a part in the form of a chat's."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS:
        own: dict[str, Any] = {"type": "text", "text": part.get("text")}
    elif kind == "refusal":
        own = {"type": "text", "text": part.get("refusal")}
    elif kind == "input_file":
        if part.get("file_url"):
            raise bad_request(
                "input_file has a file_url; no URL is opened: give file_id or file_data",
                "input",
                "unsupported_value",
            )
        own = {"type": "file", "file": part}
    else:
        # Text is all that can be read: others are refused by their type.
        return part
    return own | {name: part[name] for name in _MARKS if name in part}
