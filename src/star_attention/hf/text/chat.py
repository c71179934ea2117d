"""Chat messages cut in two: the context, which is encoded, and the turn of the query after it.

The chat template is rendered once around markers and cut at them, so that any template works. The
text before the cut is the context; the text that introduces the query and the text after it (end of
the turn, start of the answer) belong to the query. The cut is inside a user message: right after
the document if the context ends in an open user message, right before the query otherwise.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from star_attention.errors import InvalidInputError, TokenError, quote

Message = dict[str, Any]
_CUT = "\u2063star-attention-cut\u2063"
_QUERY = "\u2063star-attention-query\u2063"
_WINDOW = 200
"""Characters on each side of the cut that are tokenized together, to see if the cut matters."""


@dataclass(frozen=True, kw_only=True)
class ChatContext:
    """The encoded messages of a chat, and how a query continues them.

    Attributes:
        messages: the encoded messages; the last one is a user message if `open`.
        open: True if the query continues the last user message.
        parts: True if the template takes a message as a list of parts, not only as one string.
        question: the last part of a user message with several; the query if none is given.
        head: the rendered context.
    """

    messages: list[Message]
    open: bool
    parts: bool
    question: str | None
    head: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, as saved contexts store them."""
        return asdict(self)


def is_messages(value: Any) -> bool:
    """True if a value is a list of chat messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(m, dict) and "role" in m for m in value)
    )


def user_message(text: str) -> list[Message]:
    """Wrap a text in a user message, which stays open for the query."""
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def open_context(tokenizer: Any, messages: list[Message]) -> ChatContext:
    """Render messages as a context.

    If the last message is a user message, it stays open for the query; if it has several text
    parts, the last one is the question and not encoded. After any other message, the query begins a
    new user message.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: the conversation so far.

    Raises:
        InvalidInputError: no chat template, or one that cannot be cut; messages without text.
        TokenError: all texts are empty.
    """
    _check_template(tokenizer)
    messages = copy.deepcopy(list(messages))
    last, question = messages[-1], None
    texts = [_texts(message) for message in messages]
    if not any(text for parts in texts for text in parts):
        raise TokenError(
            "the context is empty: its messages contain no text; Star Attention needs at least 1"
            " token of context"
        )
    is_open = last["role"] == "user"
    if is_open and len(texts[-1]) > 1:
        question = texts[-1][-1]
        last["content"] = [{"type": "text", "text": text} for text in texts[-1][:-1]]
    parts = _takes_parts(tokenizer)
    head, _, _ = _cut(tokenizer, messages, is_open, parts, [])
    return ChatContext(messages=messages, open=is_open, parts=parts, question=question, head=head)


def continue_context(tokenizer: Any, chat: ChatContext, query: str | list[Message] | None) -> str:
    """Return the text of a query's turn and the start of the answer, as it follows the context.

    Args:
        tokenizer: the tokenizer that the context was rendered with.
        chat: the encoded messages.
        query: a text, messages that begin with a user message, or None for the chat's own question.

    Raises:
        InvalidInputError: there is no question, or messages cannot follow the context.
        TokenError: the query is empty.
    """
    if query is None:
        if chat.question is None:
            raise InvalidInputError(
                "no query: this chat context has no question of its own; give one"
            )
        query = chat.question
    more: list[Message] = []
    if not isinstance(query, str):
        first, more = query[0], list(query[1:])
        if first["role"] != "user":
            raise InvalidInputError(
                f"a query must begin with a user message, not with role {quote(first['role'])}"
            )
        texts = _texts(first)
        if chat.open and len(texts) > 1 and texts[:-1] == _texts(chat.messages[-1]):
            # The encoded message, repeated with a question: only the question is new.
            texts = texts[-1:]
        query = "\n".join(texts)
    if not query:
        raise TokenError("the query is empty; give at least 1 token")
    head, before, after = _cut(tokenizer, chat.messages, chat.open, chat.parts, more)
    if head != chat.head:
        warnings.warn(
            "the chat template renders the context differently now than when it was encoded (a"
            " date, or a later message that changes earlier ones); the answer continues what was"
            " encoded",
            stacklevel=2,
        )
    return before + query + after


def extended(tokenizer: Any, chat: ChatContext, more: str) -> ChatContext:
    """Return the same chat with `more` appended to its open user message."""
    messages = copy.deepcopy(chat.messages)
    texts = _texts(messages[-1])
    texts[-1] += more
    messages[-1]["content"] = [{"type": "text", "text": text} for text in texts]
    head, _, _ = _cut(tokenizer, messages, True, chat.parts, [])
    return replace(chat, messages=messages, head=head)


def warn_about_cut(tokenizer: Any, head: str, tail: str) -> None:
    """Warn if context and query, tokenized apart, differ from the joined text."""
    a, b = head[-_WINDOW:], tail[:_WINDOW]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (a, b, a + b)]
    if ids[0] + ids[1] != ids[2]:
        warnings.warn(
            "the text is tokenized differently across the cut between context and query"
            f" ({a[-12:]!r} | {b[:12]!r}); end the context with a line break to avoid it",
            stacklevel=2,
        )


def _texts(message: Message) -> list[str]:
    """Return the text parts of a message."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, (list, tuple)) and content:
        if not all(isinstance(part, dict) for part in content):
            raise InvalidInputError(
                f"a chat message has parts that are not dicts: {quote(message)}"
            )
        kinds = {part.get("type", "text") for part in content}
        if kinds == {"text"}:
            texts = [part.get("text") for part in content]
            if all(isinstance(text, str) for text in texts):
                return texts
            raise InvalidInputError(f"a chat message has a part without a text: {quote(message)}")
        raise InvalidInputError(
            f"a chat message has parts of type {', '.join(sorted(kinds - {'text'}))}; only text can"
            " be encoded"
        )
    raise InvalidInputError(f"a chat message has no text: {quote(message)}")


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
    """True if the template renders the text parts of a message, and not a Python list of them."""
    probe = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}],
        }
    ]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    except Exception:
        # A template may raise anything for content that it does not know.
        return False
    return "first" in text and "second" in text and "'text'" not in text and '"text"' not in text


def _cut(
    tokenizer: Any, messages: list[Message], is_open: bool, parts: bool, more: list[Message]
) -> tuple[str, str, str]:
    """Return the rendered text before the cut, from there to the query, and after the query."""
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
    except Exception as error:
        # A template may raise anything for messages that it does not accept.
        raise InvalidInputError(
            f"the chat template rejects these messages: {error}; use raw text instead"
        ) from error
    if text.count(_CUT) != 1 or text.count(_QUERY) != 1:
        raise InvalidInputError(
            "the chat template does not render the user's text exactly once and unchanged; use raw"
            " text instead"
        )
    head, rest = text.split(_CUT)
    before, after = rest.split(_QUERY)
    return head, before, after
