"""The options of chats: `--chat`, `--system` and `--chat-template-kwargs`."""

from __future__ import annotations

import json
from typing import Any

from star_attention.cli.inputs import check_utf8
from star_attention.cli.options import ContextOptions
from star_attention.errors import InvalidInputError, TokenError, quote


def messages(text: str, context: ContextOptions) -> list[dict[str, Any]]:
    """Return a text as a user message, after the system message if there is one."""
    system = [] if context.system is None else [{"role": "system", "content": context.system}]
    return [*system, {"role": "user", "content": text}]


def check_chat(context: ContextOptions) -> None:
    """Refuse options about a chat where there is none, and those that cannot be read.

    Raises:
        InvalidInputError: A value without --chat, or not a JSON object.
        TokenError: If the system message is empty.
        TextError: If it is not UTF-8.
    """
    if context.system is not None:
        check_utf8("system message", context.system)
        if not context.system.strip():
            raise TokenError("the system message is empty; give --system at least one word")
    template_kwargs(context.chat_template_kwargs)
    for name, value in (
        ("--system", context.system),
        ("--chat-template-kwargs", context.chat_template_kwargs),
    ):
        if value is not None and not context.chat:
            raise InvalidInputError(f"{name} has no effect without --chat; add --chat")


def template_kwargs(text: str | None) -> dict[str, Any] | None:
    """Read `--chat-template-kwargs`.

    Raises:
        InvalidInputError: If it is not a JSON object.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(
            f"--chat-template-kwargs {quote(text)} is not JSON ({error}); give an object such as"
            " '{\"enable_thinking\": false}'"
        ) from None
    if not isinstance(value, dict):
        raise InvalidInputError(
            f"--chat-template-kwargs {quote(text)}: expected a JSON object, got"
            f" {type(value).__name__}; give one such as '{{\"enable_thinking\": false}}'"
        )
    return value
