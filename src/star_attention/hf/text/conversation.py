"""The encoded messages of a chat, and the conversations that queries make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from star_attention.errors import InvalidInputError, TokenError, quote
from star_attention.hf.text.messages import REASONING, Message, normalized, parts, texts
from star_attention.hf.text.rendered import RenderedText


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


def query_messages(chat: ChatContext, query: str | list[Any] | None) -> list[Message]:
    """Return the messages of a query: none for the answer to a tool's result."""
    if query is None:
        if chat.question is None and chat.messages[-1]["role"] == "tool":
            return []
        if chat.question is None:
            raise InvalidInputError(
                "no query: this chat context has no question of its own; give one (the answer"
                " continues a message of the assistant that the query ends in)"
            )
        query = chat.question
    more = [{"role": "user", "content": query}] if isinstance(query, str) else normalized(query)
    more = _without_repetition(chat, more)
    first, last = more[0], more[-1]
    if first["role"] == "assistant" or (chat.open and first["role"] != "user"):
        remedy = {
            "assistant": "give the start of an answer as answer_prefix",
            "system": "give it before the text that is encoded",
            "developer": "give it before the text that is encoded",
        }
        raise InvalidInputError(
            f"a query must begin with a user message, not with role {quote(first['role'])};"
            f" {remedy.get(first['role'], 'give the question as the first message')}"
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


def _without_repetition(chat: ChatContext, more: list[Message]) -> list[Message]:
    """Return a query without the messages before it, if it repeats all of them.

    That is sure where it begins with the system message, or where they hold an answer.
    """
    messages, count = chat.messages, len(chat.messages)
    has_answer = not chat.open and any(m["role"] == "assistant" for m in messages)
    if has_answer and len(more) > count and _repeats(messages, more):
        return more[count:]
    repeats = more[0] == messages[0] and more[0]["role"] in ("system", "developer")
    if not repeats or len(more) < count:
        return more
    if not chat.open and len(more) > count and _repeats(messages, more):
        return more[count:]
    last = more[count - 1]
    if not chat.open or more[: count - 1] != messages[:-1] or last["role"] != "user":
        return more
    rest = _rest(messages[-1]["content"], last["content"])
    return [{**last, "content": rest}, *more[count:]] if rest else more


def _repeats(messages: list[Message], more: list[Message]) -> bool:
    """True if `more` begins with all messages; clients may leave an answer's reasoning out."""
    return all(
        _without_reasoning(old) == _without_reasoning(new)
        for old, new in zip(messages, more, strict=False)
    )


def _without_reasoning(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in REASONING}


def _rest(document: Any, content: Any) -> Any:
    """Return what a message has after an encoded one, "" if it does not repeat that."""
    if isinstance(document, list) and isinstance(content, list):
        return content[len(document) :] if content[: len(document)] == document else ""
    if isinstance(document, list) and len(document) == 1:
        document = document[0]["text"]
    if isinstance(content, str) and isinstance(document, str) and content.startswith(document):
        return content[len(document) :]
    return ""


def joined(chat: ChatContext, more: list[Message]) -> list[Message]:
    """Return the whole conversation: the first user message of a query continues an open one."""
    if not chat.open:
        return [*chat.messages, *more]
    first, *others = more
    last = chat.messages[-1]
    content = _joined_content(last["content"], first["content"])
    return [*chat.messages[:-1], {**first, **last, "content": content}, *others]


def after_turns(chat: ChatContext, earlier: Sequence[Message]) -> ChatContext:
    """Return a chat with messages after the encoded ones, and the head of the encoded ones."""
    if not earlier:
        return chat
    messages = joined(chat, list(earlier))
    return replace(chat, messages=messages, open=False, parts=False, question=None)


def answered(messages: list[Message], text: str, reasoning: str | None) -> list[Message]:
    """Return the messages of a query with its answer, which may continue the last of them."""
    answer: Message = {"role": "assistant", "content": text}
    if messages and messages[-1]["role"] == "assistant":
        *messages, start = messages
        answer = {**start, "content": "".join(texts(start)) + text}
    if reasoning:
        answer["reasoning_content"] = reasoning
    return [*messages, answer]


def _joined_content(document: Any, query: Any) -> Any:
    """Return the content of a message: one string, or parts if the user gave parts."""
    if isinstance(document, list):
        return [*document, *parts(query)]
    if isinstance(query, list) and len(query) > 1:
        return [*parts(document), *query]
    return document + (query if isinstance(query, str) else query[0]["text"])


def longer(chat: ChatContext, more: str) -> ChatContext:
    """Return a chat with a longer last message, and the head of the shorter one."""
    last = chat.messages[-1]
    content = last["content"]
    if isinstance(content, str):
        content += more
    else:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + more}]
    return replace(chat, messages=[*chat.messages[:-1], {**last, "content": content}])
