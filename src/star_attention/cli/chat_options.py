"""The options of chats: `--chat`, `--system`, `--chat-template-kwargs` and `--tools`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from star_attention.cli.inputs import STDIN, check_utf8
from star_attention.cli.options import ContextOptions
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import InvalidInputError, TokenError, quote

if TYPE_CHECKING:
    from star_attention.engine import StarLLM
    from star_attention.storage.context import EncodedContext


def messages(text: str, context: ContextOptions) -> list[dict[str, Any]]:
    """Return a text as a user message, after the system message if there is one."""
    system = [] if context.system is None else [{"role": "system", "content": context.system}]
    return [*system, {"role": "user", "content": text}]


def check_chat(context: ContextOptions) -> None:
    """Refuse options about a chat where there is none, and those that cannot be read.

    Raises:
        InvalidInputError: A value without --chat, or not a JSON object.
        TokenError: If the system message is empty.
        TextError: If it is not UTF-8, or the file of tools cannot be read.
    """
    if context.system is not None:
        check_utf8("system message", context.system)
        if not context.system.strip():
            raise TokenError("the system message is empty; give --system at least one word")
    context_kwargs(context)
    for name, value in (
        ("--system", context.system),
        ("--chat-template-kwargs", context.chat_template_kwargs),
        ("--tools", context.tools),
    ):
        if value is not None and not context.chat:
            raise InvalidInputError(f"{name} has no effect without --chat; add --chat")


def context_kwargs(context: ContextOptions) -> dict[str, Any] | None:
    """Return what the chat template reads beside messages: `--chat-template-kwargs` and `--tools`.

    Raises:
        InvalidInputError: If one of them has another form.
        TextError: If the file of tools cannot be read, or is not JSON.
    """
    kwargs = template_kwargs(context.chat_template_kwargs)
    # The other ranks' arguments do not count.
    if context.tools is None or not is_rank_0():
        return kwargs
    if "tools" in (kwargs or {}):
        # Slow to import.
        from star_attention.hf.text.tool_reader import given_twice

        raise InvalidInputError(given_twice("by --tools and in --chat-template-kwargs"))
    if context.tools == STDIN:
        raise InvalidInputError("--tools - does not work: stdin has texts and queries; give a file")
    tools = context.tools_read
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidInputError(
            f"{context.tools}: expected a list of tools such as"
            ' [{"type": "function", "function": {"name": ..., "parameters": {...}}}], got'
            f" {quote(tools)}"
        )
    return {**(kwargs or {}), "tools": tools}


def check_choice(star: StarLLM, kwargs: dict[str, Any], *known: dict[str, Any] | None) -> None:
    """Refuse a `--tool-choice` that no answer can follow, before there is any question. Collective.

    Args:
        star: The engine.
        kwargs: Keyword arguments of `StarLLM.generate`.
        known: What the chat template reads beside messages; later ones override.

    Raises:
        InvalidInputError: There are no tools, none of this name, or none that can be called.
    """
    from star_attention.hf.text.tool_reader import is_forced

    if is_forced(kwargs.get("tool_choice")):
        read = {name: value for each in known for name, value in (each or {}).items()}
        tools = star.from_rank_0(read.get("tools") or [])
        star.check_settings(tools=tools, tool_choice=kwargs["tool_choice"])


def check_choice_on(star: StarLLM, context: EncodedContext, kwargs: dict[str, Any]) -> None:
    """Do as `check_choice` for questions on an encoded context. Collective.

    Raises:
        InvalidInputError: As there.
    """
    stored = (context.chat or {}).get("template_kwargs")
    check_choice(star, kwargs, stored, kwargs.get("chat_template_kwargs"))


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
