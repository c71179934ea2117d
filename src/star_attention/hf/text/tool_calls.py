"""Arguments of tool calls: an object, or its JSON text, as OpenAI's chat format has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def with_arguments(message: Message, takes: Callable[[type], bool]) -> Message:
    """Return a message whose tool calls have their arguments in a form that a template takes.

    Many templates write an object as JSON, and a text in quotes with backslashes; some write a text
    alone.

    Args:
        message: a normalized message.
        takes: says whether the template takes a dict, and whether a str; asked where needed.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_converted(call, takes) for call in calls]}


def has_odd_arguments(message: Message) -> bool:
    """True if the arguments of a tool call are a text that is no JSON object."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    given = [function.get("arguments") for function in functions]
    return any(isinstance(each, str) and _object(each) is None for each in given)


def is_written(text: str, name: str, value: str) -> bool:
    """True if a text has the arguments `{name: value}`, and not as a quoted text or in Python."""
    quoted = f'\\"{name}', f"'{name}'", f"'{{\"{name}"
    return name in text and value in text and not any(form in text for form in quoted)


def _converted(call: dict[str, Any], takes: Callable[[type], bool]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _converted(call["function"], takes)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and not takes(str) and takes(dict):
        value = _object(arguments)
        return call if value is None else {**call, "arguments": value}
    if isinstance(arguments, dict) and not takes(dict) and takes(str):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _object(text: str) -> dict[str, Any] | None:
    """Return the object that a JSON text is; None for another text."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
