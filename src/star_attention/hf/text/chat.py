"""Chat messages cut in two: what is encoded as context, and what a query continues.

The chat template is rendered once around sentinels and cut there, so that any template works: the head is the context, what
introduces the query and what follows it (end of the turn, start of the answer) goes with the query. The cut lies inside a user
message: right behind the document part when the context ends in an open user message, right before the query's text otherwise.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from star_attention.errors import InvalidInputError, TokenError

Message = dict[str, Any]
_CUT = "\u2063star-attention-cut\u2063"
_QUERY = "\u2063star-attention-query\u2063"
_WINDOW = 200
"""Characters on each side of the cut that are tokenized together, to see whether the cut changes them."""


@dataclass(frozen=True, kw_only=True)
class ChatContext:
    """How a chat goes on after its context.

    messages: the encoded messages; the last is a user message when `open`.
    open: the last user message goes on with the query.
    parts: the template takes a user message as a list of parts (else as one string).
    question: the second part of a message that came with one; the query when none is given.
    head: the rendered context.
    """

    messages: list[Message]
    open: bool
    parts: bool
    question: str | None
    head: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_messages(value: Any) -> bool:
    """Whether a value is a list of chat messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(m, dict) and "role" in m for m in value)
    )


def user_message(text: str) -> list[Message]:
    """A text as messages: the first part of a user message, which stays open for the query."""
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def open_context(tokenizer: Any, messages: list[Message]) -> ChatContext:
    """Render messages as a context.

    A last user message stays open for the query; where it has several text parts, the last part is the question and is
    left out. After any other message the query begins a new user message.
    """
    _check_template(tokenizer)
    messages = copy.deepcopy(list(messages))
    last, question = messages[-1], None
    texts = [_texts(message) for message in messages]
    if not any(text for told in texts for text in told):
        raise TokenError(
            "the context is empty: its messages hold no text; Star Attention needs at least 1 token of context"
        )
    is_open = last["role"] == "user"
    if is_open and len(texts[-1]) > 1:
        question = texts[-1][-1]
        last["content"] = [{"type": "text", "text": text} for text in texts[-1][:-1]]
    parts = _takes_parts(tokenizer)
    head, _, _ = _cut(tokenizer, messages, is_open, parts, [])
    return ChatContext(messages=messages, open=is_open, parts=parts, question=question, head=head)


def continue_context(tokenizer: Any, chat: ChatContext, query: str | list[Message] | None) -> str:
    """The text that follows the context for a query: its turn, and the start of the answer."""
    if query is None:
        if chat.question is None:
            raise InvalidInputError("no query: this chat context came without a question; give one")
        query = chat.question
    more: list[Message] = []
    if not isinstance(query, str):
        first, more = query[0], list(query[1:])
        if first["role"] != "user":
            raise InvalidInputError(
                f"a query must begin with a user message, not with role {first['role']!r}"
            )
        texts = _texts(first)
        if chat.open and len(texts) > 1 and texts[:-1] == _texts(chat.messages[-1]):
            texts = texts[-1:]  # the message that was encoded, with its question: ask that
        query = "\n".join(texts)
    if not query:
        raise TokenError("the query is empty; give at least 1 token")
    head, before, after = _cut(tokenizer, chat.messages, chat.open, chat.parts, more)
    if head != chat.head:
        warnings.warn(
            "the chat template renders the context differently now than when it was encoded (a date, or a later message"
            " that changes earlier ones); the answer goes on from what was encoded",
            stacklevel=2,
        )
    return before + query + after


def extended(tokenizer: Any, chat: ChatContext, more: str) -> ChatContext:
    """The same chat with `more` at the end of its open user message."""
    messages = copy.deepcopy(chat.messages)
    texts = _texts(messages[-1])
    texts[-1] += more
    messages[-1]["content"] = [{"type": "text", "text": text} for text in texts]
    head, _, _ = _cut(tokenizer, messages, True, chat.parts, [])
    return replace(chat, messages=messages, head=head)


def warn_about_cut(tokenizer: Any, head: str, tail: str) -> None:
    """Warn where context and query, tokenized apart, differ from the joined text."""
    a, b = head[-_WINDOW:], tail[:_WINDOW]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (a, b, a + b)]
    if ids[0] + ids[1] != ids[2]:
        warnings.warn(
            f"the text is tokenized differently across the cut between context and query ({a[-12:]!r} | {b[:12]!r});"
            " end the context with a line break to avoid it",
            stacklevel=2,
        )


def _texts(message: Message) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, (list, tuple)) and content:
        if not all(isinstance(part, dict) for part in content):
            raise InvalidInputError(f"a chat message has parts that are no dicts: {message!r}")
        kinds = {part.get("type", "text") for part in content}
        if kinds == {"text"}:
            texts = [part.get("text") for part in content]
            if all(isinstance(text, str) for text in texts):
                return texts
            raise InvalidInputError(f"a chat message has a part without a text: {message!r}")
        raise InvalidInputError(
            f"a message has parts of type {', '.join(sorted(kinds - {'text'}))}; only text can be encoded"
        )
    raise InvalidInputError(f"a chat message has no text: {message!r}")


def _check_template(tokenizer: Any) -> None:
    if tokenizer is None:
        raise InvalidInputError(
            "chat messages need a tokenizer; give one to StarLLM, or use token ids"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            "this model has no chat template; use raw text, or set tokenizer.chat_template"
        )


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template renders a message of several text parts as their texts (and not as a Python list)."""
    probe = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}],
        }
    ]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise anything for content that it does not know
        return False
    return "first" in text and "second" in text and "'text'" not in text and '"text"' not in text


def _cut(
    tokenizer: Any, messages: list[Message], is_open: bool, parts: bool, more: list[Message]
) -> tuple[str, str, str]:
    """Rendered text up to the cut, from there to the place of the query, and behind it."""
    messages = copy.deepcopy(messages)
    if not is_open:
        messages.append({"role": "user", "content": _CUT + _QUERY})
    elif parts:
        *earlier, last = _texts(messages[-1])
        messages[-1]["content"] = [
            {"type": "text", "text": text} for text in [*earlier, last + _CUT, _QUERY]
        ]
    else:
        messages[-1]["content"] = "".join(_texts(messages[-1])) + _CUT + _QUERY
    try:
        text: str = tokenizer.apply_chat_template(
            messages + more, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything for messages that it does not take
        raise InvalidInputError(f"the chat template refuses these messages: {error}") from error
    if text.count(_CUT) != 1 or text.count(_QUERY) != 1:
        raise InvalidInputError(
            "the chat template does not write the user's text once, as it is; use raw text instead"
        )
    head, rest = text.split(_CUT)
    before, after = rest.split(_QUERY)
    return head, before, after
