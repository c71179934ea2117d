"""Chat messages in every form of OpenAI's chat format, as the plain dicts that templates read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text.checks import checked_text

Message = dict[str, Any]
"""A normalized message: a role, usually a content (a str or a list of text parts), and whatever
else templates read, all of it JSON."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {
    "human": "user",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "gpt": "assistant",
}
"""Names of roles in other formats of chats."""

_TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of an answer's reasoning."""
_UNKNOWN_FIELDS = {
    "function_call": "give it in tool_calls",
    "audio": "give its transcript as content",
    "refusal": "give its text as content",
}


def is_messages(value: Any) -> bool:
    """True if a value is one conversation: a list that begins with a message, complete or not."""
    return isinstance(value, (list, tuple)) and bool(value) and is_message(value[0])


def is_message(value: Any) -> bool:
    """True for a dict, and for an object with a role that can be read like one."""
    if isinstance(value, Mapping):
        return True
    readable = is_dataclass(value) or callable(getattr(value, "model_dump", None))
    return readable and not isinstance(value, type) and hasattr(value, "role")


def normalized(messages: Sequence[Any]) -> list[Message]:
    """Return a conversation as plain dicts of its own, with fields that are None left out.

    Raises:
        InvalidInputError: something else than a message, a message without role or text, or parts
            other than text; names the message.
    """
    return [
        _normalized(message, f"message {number} of {len(messages)}")
        for number, message in enumerate(messages, start=1)
    ]


def texts(message: Message) -> list[str]:
    """Return the texts of a normalized message: one for a str, none without content."""
    content = message.get("content")
    if content is None:
        return []
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def plain(value: Any, where: str) -> Any:
    """Return a value as JSON values of its own, which files can hold.

    Raises:
        InvalidInputError: it holds something else.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        # Of a str that is also an Enum, str() would give the member's name.
        return checked_text(str.__str__(value), where)
    if isinstance(value, Mapping):
        return {str(key): plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump(), where)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), where) for f in fields(value)}
    raise InvalidInputError(
        f"{where} has a value of type {type(value).__name__}; give str, numbers, lists and dicts"
    )


def _normalized(value: Any, where: str) -> Message:
    if not is_message(value):
        raise InvalidInputError(
            f"{where} is of type {type(value).__name__}; expected a dict with role and content"
        )
    message = {key: item for key, item in plain(value, where).items() if item is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidInputError(
            f"{where} has no role, but {quote(sorted(message))}; expected 'role' and 'content'"
        )
    where = f"{where} (role {quote(role)})"
    _warn_about_role(role, where)
    for field, remedy in _UNKNOWN_FIELDS.items():
        if message.get(field):
            raise InvalidInputError(f"{where} has a {field}, which templates do not read; {remedy}")
        message.pop(field, None)
    _check_tool_calls(message, where)
    if "content" in message:
        message["content"] = _content(message["content"], where)
    elif not message.get("tool_calls") and not any(message.get(name) for name in REASONING):
        raise _no_text(message, where)
    return message


def _warn_about_role(role: str, where: str) -> None:
    """Warn about another name of a role: many templates write whatever is there as a turn's."""
    lower = role.strip().lower()
    meant = _OTHER_NAMES.get(lower, lower if lower in _ROLES else role)
    if role not in _ROLES and meant != role:
        warnings.warn(
            f"{where} has a role that few chat templates know; give {quote(meant)} if that is"
            " meant",
            stacklevel=2,
        )


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Return content that is a str, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _no_text(content, where)
    found = []
    for number, part in enumerate(content, start=1):
        if not isinstance(part, dict):
            raise InvalidInputError(
                f"{where} has a part {number} of type {type(part).__name__}; expected"
                ' {"type": "text", "text": ...}'
            )
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise InvalidInputError(
                f"a chat message has parts of type {str(kind)[:80]}; only text can be encoded:"
                f" leave them out of {where}, or describe them in words"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidInputError(f"{where} has a part {number} without a text; give it one")
        found.append({**part, "type": "text"})
    return found


def _no_text(value: Any, where: str) -> InvalidInputError:
    return InvalidInputError(
        f"a chat message has no text: {quote(value)}; give {where} a content, a str or a list of"
        " text parts"
    )


def _check_tool_calls(message: Message, where: str) -> None:
    calls = message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise InvalidInputError(
            f"{where} has tool_calls of type {type(calls).__name__}; expected a list of dicts"
        )
    for call in calls or ():
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidInputError(
                f"{where} has the tool call {quote(call)}, which names no function; expected"
                ' {"function": {"name": ..., "arguments": ...}}'
            )
