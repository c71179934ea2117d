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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from star_attention.errors import InvalidInputError, TokenError, quote
from star_attention.hf.text import literal
from star_attention.hf.text.messages import Message, is_messages, normalized, parts, texts
from star_attention.hf.text.rendered import RenderedText, shared_prefix
from star_attention.hf.text.template import (
    PROBES,
    ChatTemplate,
    check_template,
    check_written,
    left_out,
)

__all__ = [
    "ChatContext",
    "Message",
    "check_template",
    "continue_context",
    "extended",
    "is_messages",
    "open_context",
    "user_message",
]

_ATTEMPTS = 3
"""Renderings of one prompt, in case a template's clock moves on between two of them."""


@dataclass(frozen=True, kw_only=True)
class ChatContext:
    """The encoded messages of a chat, and how a query continues them.

    Attributes:
        messages: the encoded messages; the last one is a user message if `open`.
        open: True if the query continues the last user message.
        parts: True if that message's content is a list of parts, to which a query adds another: as
            the user gave it, or because the template puts control tokens between parts. Otherwise
            document and query are one string.
        question: the last part of a user message with several; the query if none is given.
        head: the rendered context.
        literal: spans of the head that users wrote, as in `RenderedText`.
        template_kwargs: what the template reads beside the messages.
    """

    messages: list[Message]
    open: bool
    parts: bool
    question: str | None
    head: str
    literal: list[list[int]] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ChatContext:
        """Return the chat of a saved context."""
        chat = cls(**state)
        last = chat.messages[-1]
        if chat.parts and chat.open and isinstance(last.get("content"), str):
            # Saved when a string became a part wherever a template took parts.
            content = {"content": parts(last["content"])}
            chat = replace(chat, messages=[*chat.messages[:-1], {**last, **content}])
        return chat

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, as saved contexts store them."""
        return asdict(self)

    @property
    def rendered(self) -> RenderedText:
        """The rendered context, with what users wrote in it."""
        return RenderedText(self.head, tuple((start, end) for start, end in self.literal))


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
    warn: bool = True,
) -> RenderedText:
    """Return the text of a query's turn and the start of the answer, as it follows the context.

    Args:
        tokenizer: the tokenizer that the context was rendered with.
        chat: the encoded messages.
        query: a text, messages, or None for the chat's own question (or, after a tool's result, for
            the answer to it). A last message of the assistant is continued by the answer.
        template_kwargs: what the template reads beside the messages, where it differs from the
            context's.
        warn: warn of texts that have been through a template, and of one that writes the context
            otherwise than before.

    Raises:
        InvalidInputError: there is no question, or messages cannot follow the context.
        TokenError: the query is empty.
    """
    stored = ChatTemplate(tokenizer, chat.template_kwargs)
    template = stored
    if template_kwargs:
        template = ChatTemplate(tokenizer, {**chat.template_kwargs, **template_kwargs})
    more = _query_messages(chat, query)
    if warn:
        _warn_if_rendered(template, more)
    conversation = _joined(chat, more)
    whole, start = literal.render(template, conversation), len(chat.head)
    if not whole.text.startswith(chat.head):
        whole, start = _moved(stored, template, chat, conversation, warn=warn)
    unchanged = len(chat.messages) - (1 if chat.open else 0)
    check_written(whole.text, conversation[unchanged:], first=unchanged + 1)
    return whole.slice(start)


def extended(tokenizer: Any, chat: ChatContext, more: str) -> ChatContext:
    """Return the same chat with `more` appended to its open user message.

    Raises:
        InvalidInputError: the template writes the message differently when it is longer.
    """
    template = ChatTemplate(tokenizer, chat.template_kwargs)
    longer = _longer(chat, more)
    before, head = _head(template, chat), _head(template, longer)
    if head.text != before.text + more:
        raise InvalidInputError(
            "the chat template writes the encoded message differently when it is longer; encode"
            " all of it again"
        )
    rendered = chat.rendered + head.slice(len(before))
    return replace(longer, head=rendered.text, literal=[list(span) for span in rendered.literal])


def _with_head(template: ChatTemplate, chat: ChatContext) -> ChatContext:
    head = _head(template, chat)
    return replace(chat, head=head.text, literal=[list(span) for span in head.literal])


def _head(template: ChatTemplate, chat: ChatContext) -> RenderedText:
    """Return what the template writes before any query.

    Raises:
        InvalidInputError: the template leaves a message out, or nothing can follow the messages.
    """
    head: RenderedText | None = None
    failure = None
    for conversations in _continued(chat):
        try:
            rendered = [literal.render(template, conversation) for conversation in conversations]
        except InvalidInputError as error:
            failure = failure or error
            continue
        shared = shared_prefix(text.text for text in rendered)
        if not all(any(probe in text.text[len(shared) :] for probe in PROBES) for text in rendered):
            raise InvalidInputError(
                "the chat template does not render the user's text exactly once and unchanged; use"
                " raw text instead"
            )
        if head is None:
            check_written(rendered[0].text, chat.messages)
            head = rendered[0].slice(0, len(shared))
            continue
        shared = shared_prefix([head.text, shared])
        # A way to go on that writes the messages otherwise is refused when it is taken.
        if left_out(shared, chat.messages) == left_out(head.text, chat.messages):
            head = head.slice(0, len(shared))
    if head is None:
        assert failure is not None, "there are ways to go on"
        raise failure
    return head


def _continued(chat: ChatContext) -> Iterator[list[list[Message]]]:
    """Yield ways to go on after the context, the most likely one first, with different texts."""
    last = chat.messages[-1]
    calls = last.get("tool_calls")
    if last["role"] == "tool":
        # The answer follows. The cut leaves it the end of the turn, so that it has a prompt.
        yield [_longer(chat, probe).messages for probe in PROBES]
    if last["role"] == "tool" or calls:
        ids = {key: last[key] for key in ("name", "tool_call_id") if key in last}
        if calls:
            name = calls[0].get("function", calls[0]).get("name")
            ids = {"name": name, "tool_call_id": calls[0].get("id")}
        result: Message = {"role": "tool", **{key: ids[key] for key in ids if ids[key] is not None}}
        yield [[*chat.messages, {**result, "content": probe}] for probe in PROBES]
    questions = [_joined(chat, [{"role": "user", "content": probe}]) for probe in PROBES]
    if chat.parts:
        # The last part itself may be longer.
        longer = _longer(chat, PROBES[0])
        questions.append(_joined(longer, [{"role": "user", "content": PROBES[1]}]))
    yield questions


def _longer(chat: ChatContext, more: str) -> ChatContext:
    """Return a chat with a longer last message, and the head of the shorter one."""
    last = chat.messages[-1]
    content = last["content"]
    if isinstance(content, str):
        content += more
    else:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + more}]
    return replace(chat, messages=[*chat.messages[:-1], {**last, "content": content}])


def _query_messages(chat: ChatContext, query: str | list[Any] | None) -> list[Message]:
    """Return the messages of a query: none for the answer to a tool's result."""
    if query is None:
        if chat.question is None and chat.messages[-1]["role"] == "tool":
            return []
        if chat.question is None:
            raise InvalidInputError(
                "no query: this chat context has no question of its own; give one"
            )
        query = chat.question
    more = [{"role": "user", "content": query}] if isinstance(query, str) else normalized(query)
    first, last = more[0], more[-1]
    if first["role"] == "assistant" or (chat.open and first["role"] != "user"):
        raise InvalidInputError(
            f"a query must begin with a user message, not with role {quote(first['role'])}; give"
            " the start of an answer as answer_prefix"
        )
    if all(m["role"] == "user" and not "".join(texts(m)).strip() for m in more):
        raise TokenError("the query is empty, or white space; give at least 1 token")
    if last["role"] == "assistant" and (last.get("tool_calls") or not "".join(texts(last)).strip()):
        raise InvalidInputError(
            "the query ends in a message of the assistant that the answer cannot continue, because"
            " it has no text or calls tools; leave it out, or give the tool's result after it"
        )
    if chat.open and len(texts(first)) > 1 and texts(first)[:-1] == texts(chat.messages[-1]):
        # The encoded message, repeated with a question: only the question is new.
        first["content"] = texts(first)[-1]
    return more


def _joined(chat: ChatContext, more: list[Message]) -> list[Message]:
    """Return the whole conversation: the first user message of a query continues an open one."""
    if not chat.open:
        return [*chat.messages, *more]
    first, *others = more
    last = chat.messages[-1]
    content = _joined_content(last["content"], first["content"])
    return [*chat.messages[:-1], {**first, **last, "content": content}, *others]


def _joined_content(document: Any, query: Any) -> Any:
    """Return the content of a message: one string, or parts if the user gave parts."""
    if isinstance(document, list):
        return [*document, *parts(query)]
    if isinstance(query, list) and len(query) > 1:
        return [*parts(document), *query]
    return document + (query if isinstance(query, str) else query[0]["text"])


def _moved(
    stored: ChatTemplate,
    template: ChatTemplate,
    chat: ChatContext,
    conversation: list[Message],
    *,
    warn: bool,
) -> tuple[RenderedText, int]:
    """Return a prompt that does not begin with the encoded text, and where its tail begins.

    Raises:
        InvalidInputError: the tail would not be the rest of this conversation's prompt.
    """
    for _ in range(_ATTEMPTS):
        now, whole = _head(stored, chat).text, literal.render(template, conversation)
        if whole.text.startswith(now):
            if warn:
                warnings.warn(
                    "the chat template renders the context differently now than when it was encoded"
                    " (a date, or another template); the answer continues what was encoded",
                    stacklevel=4,
                )
            return whole, len(now)
    names = [name for name in template.kwargs if template.kwargs[name] != stored.kwargs.get(name)]
    if names and _head(template, chat).text != now:
        raise InvalidInputError(
            f"chat_template_kwargs {quote(names)} change the encoded part of the prompt; encode"
            " the context with them"
        )
    raise InvalidInputError(
        "the chat template writes the encoded messages differently before the messages of this"
        f" query (it has {_differing(whole.text, now)}); encode the conversation up to its last"
        " question, and ask that alone"
    )


def _differing(text: str, expected: str) -> str:
    """Describe where two texts differ first."""
    at = len(shared_prefix([text, expected]))
    return f"{quote(text[at : at + 40])} where {quote(expected[at : at + 40])} was encoded"


def _warn_if_rendered(template: ChatTemplate, messages: list[Message]) -> None:
    """Warn of texts that seem to have been through a template before."""
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
