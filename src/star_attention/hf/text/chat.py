"""Conversations cut in two: the context, which is encoded, and what a query adds to it.

The prompt is what the chat template makes of the whole conversation, wherever the cut is. The
context is the beginning that does not depend on the query: what the template writes alike before
two different ones. A query's text is the rest of its own conversation's prompt; where that prompt
begins otherwise than the context, the query is refused.

The cut is inside a user message: right after the document if the context ends in an open user
message, right before the query otherwise. After a tool's result it is after that turn, because the
answer, another result or a user message may follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from star_attention.errors import InvalidInputError, TokenError, quote
from star_attention.hf.text import literal
from star_attention.hf.text.conversation import (
    ChatContext,
    after_turns,
    joined,
    longer,
    query_messages,
)
from star_attention.hf.text.cut import moved, shared_head
from star_attention.hf.text.messages import Message, is_messages, normalized, parts, texts
from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.template import ChatTemplate, check_template, check_written

__all__ = [
    "WARNINGS",
    "ChatContext",
    "Message",
    "check_template",
    "continue_context",
    "extended",
    "is_messages",
    "open_context",
    "user_message",
]


WARNINGS = ("rendered", "template")
"""What is warned of: text that has been rendered before, a template that writes otherwise now."""


def user_message(text: str) -> list[Message]:
    """Wrap a text in a user message, which stays open for the query."""
    return [{"role": "user", "content": text}]


def open_context(
    tokenizer: Any, messages: list[Any], template_kwargs: dict[str, Any] | None = None
) -> ChatContext:
    """Render messages as a context.

    If the last message is a user message, it stays open for the query; if it has several text
    parts, the last one is the question and not encoded. After any other message, the query begins a
    new message.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: the conversation so far.
        template_kwargs: what the template reads beside the messages.

    Raises:
        InvalidInputError: no chat template, or one that cannot be cut; messages without text, or
            that the template does not take.
        TokenError: all texts are empty.
    """
    template = ChatTemplate(tokenizer, template_kwargs)
    messages = normalized(messages)
    last, question = messages[-1], None
    if not any(text.strip() for message in messages for text in texts(message)):
        raise TokenError(
            "the context is empty: its messages contain no text; Star Attention needs at least 1"
            " token of context"
        )
    is_open = last["role"] == "user"
    if is_open and len(texts(last)) > 1:
        question = last["content"].pop()["text"]
    elif is_open and template.separates_parts():
        last["content"] = parts(last["content"])
    _warn_if_rendered(template, messages)
    chat = ChatContext(
        messages=messages,
        open=is_open,
        parts=is_open and isinstance(last["content"], list),
        question=question,
        head="",
        template_kwargs=template.kwargs,
    )
    return _with_head(template, chat)


def continue_context(
    tokenizer: Any,
    chat: ChatContext,
    query: str | list[Any] | None,
    template_kwargs: dict[str, Any] | None = None,
    *,
    earlier: Sequence[Message] = (),
    warned: set[str] | None = None,
) -> RenderedText:
    """Return the text of a query's turn and the start of the answer, as it follows the context.

    Args:
        tokenizer: the tokenizer that the context was rendered with.
        chat: the encoded messages.
        query: a text, messages, or None for the chat's own question (or, after a tool's result, for
            the answer to it). A last message of the assistant is continued by the answer.
        template_kwargs: what the template reads beside the messages, where it differs from the
            context's.
        earlier: messages between context and query, whose text comes first.
        warned: what has been warned of for this context, to say it once.

    Raises:
        InvalidInputError: there is no question, or messages cannot follow the context.
        TokenError: the query is empty.
    """
    stored = ChatTemplate(tokenizer, chat.template_kwargs)
    template = stored
    if template_kwargs:
        template = ChatTemplate(tokenizer, {**chat.template_kwargs, **template_kwargs})
    spoken = after_turns(chat, earlier)
    more = query_messages(spoken, query)
    warned = set() if warned is None else warned
    if "rendered" not in warned and _warn_if_rendered(template, more):
        warned.add("rendered")
    conversation = joined(spoken, more)
    whole, start = literal.render(template, conversation), len(chat.head)
    if not whole.text.startswith(chat.head):
        whole, start = moved(stored, template, chat, conversation, warned)
    unchanged = len(chat.messages) - (1 if chat.open else 0)
    check_written(whole.text, conversation[unchanged:], first=unchanged + 1)
    return whole.slice(start)


def extended(tokenizer: Any, state: dict[str, Any] | None, more: str) -> dict[str, Any] | None:
    """Return the state of the same chat with `more` appended to its open user message.

    Args:
        tokenizer: the tokenizer that the context was rendered with.
        state: `ChatContext.as_dict`; None for a context that is no chat, which stays None.
        more: the text.

    Raises:
        InvalidInputError: the context ends in a closed turn, or the template writes the message
            differently when it is longer.
    """
    if state is None:
        return None
    chat = ChatContext.from_dict(state)
    if not chat.open:
        raise InvalidInputError(
            "this chat context ends in a closed turn; only an open user message can be extended"
        )
    template = ChatTemplate(tokenizer, chat.template_kwargs)
    extension = longer(chat, more)
    before, head = shared_head(template, chat), shared_head(template, extension)
    if head.text != before.text + more:
        raise InvalidInputError(
            "the chat template writes the encoded message differently when it is longer; encode"
            " all of it again"
        )
    rendered = chat.rendered + head.slice(len(before))
    spans = [list(span) for span in rendered.literal]
    return replace(extension, head=rendered.text, literal=spans).as_dict()


def _with_head(template: ChatTemplate, chat: ChatContext) -> ChatContext:
    head = shared_head(template, chat)
    return replace(chat, head=head.text, literal=[list(span) for span in head.literal])


def _warn_if_rendered(template: ChatTemplate, messages: list[Message]) -> bool:
    """Warn of texts that seem to have been through a template before, and return whether."""
    beginnings = None
    for message in messages:
        text = "".join(texts(message)[:1])[:400].lstrip()
        if message["role"] == "assistant" or not text:
            continue
        beginnings = template.beginnings() if beginnings is None else beginnings
        seen = next((start for start in beginnings if text.startswith(start)), None)
        if seen is not None:
            warnings.warn(
                f"a text of role {quote(message['role'])} begins with {quote(seen)}, as the chat"
                " template itself does: if it has been through a template before, its turns are"
                " nested; give the messages themselves, or the text without a chat",
                stacklevel=4,
            )
            return True
    return False
