"""Texts and chats as the token ids of a context and of what follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text import chat, joining
from star_attention.hf.text.conversation import ChatContext
from star_attention.hf.text.joining import ContextEnd
from star_attention.hf.text.reading import Reader
from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.special import prefix_ids, rendered_ids, with_prefix
from star_attention.hf.text.tokens import checked_ids
from star_attention.serve.chats import Chats
from star_attention.serve.contexts.entry import Content
from star_attention.serve.contexts.keys import as_ids


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a context is to be made of: one of its first three fields.

    Attributes:
        text: a document.
        messages: a conversation.
        token_ids: token ids.
        after: the context that the text continues; None for a new one.
        template_kwargs: what the chat template reads beside messages.
    """

    text: str | None = None
    messages: list[Any] | None = None
    token_ids: list[int] | None = None
    after: Content | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def param(self) -> str:
        """The field of a request that has it."""
        names = ("messages", "token_ids")
        return next((name for name in names if getattr(self, name) is not None), "text")


Known = Callable[[RenderedText], Content | None]
"""Returns the content that a rendered text is known to make; None for nothing."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A cut prompt, before it is known what it is kept as.

    Attributes:
        content: its context; None where the whole is a query.
        query_ids: token ids after it.
        rule: what decided the cut.
        ttl: the least seconds to keep the context.
        keep: False for a context of this request alone.
        text: the whole prompt up to a user's last word, by which later ones that go on with it are
            looked for; None where they are not.
        raw: True if no chat template wrote it.
        unsaid_tokens: tokens after a user's last word.
    """

    content: Content | None
    query_ids: list[int]
    rule: str
    ttl: float | None = None
    keep: bool = True
    text: str | None = None
    raw: bool = False
    unsaid_tokens: int = 0


def reader_of(star: StarLLM) -> Reader:
    """Return what turns texts into ids by the settings of an engine."""
    return Reader(star.tokenizer, star.config.allow_special_tokens)


def cut_text(
    star: StarLLM,
    text: RenderedText,
    at: int,
    rule: str,
    *,
    ttl: float | None = None,
    known: Known = lambda head: None,
) -> Piece:
    """Cut a rendered chat so that the ids of both parts are those of the whole.

    Args:
        star: the engine.
        text: the chat.
        at: the character to cut before.
        rule: why there.
        ttl: the least seconds to keep the context.
        known: returns what is known of the text before the cut, so that it is not tokenized again.
    """
    if at <= 0:
        return Piece(content=None, query_ids=rendered_ids(star.tokenizer, text), rule="none")
    head = text.slice(0, at)
    content = known(head) or _rendered_content(star, head)
    end = None if content.end is None else ContextEnd.of(content.end)
    query_ids, is_joined = joining.following_ids(star.tokenizer, end, text.slice(at))
    if end is None or not is_joined:
        # The cut is inside of a token: it moves to its beginning.
        whole = rendered_ids(star.tokenizer, text)
        shared = _shared(content.ids.tolist(), whole[:-1])
        content = Content(ids=as_ids(whole[:shared]))
        query_ids = whole[shared:]
    if not len(content):
        return Piece(content=None, query_ids=query_ids, rule="none")
    return Piece(content=content, query_ids=query_ids, rule=rule, ttl=ttl)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of ids that two lists begin with alike."""
    most = min(len(first), len(second))
    return next((n for n in range(most) if first[n] != second[n]), most)


def _rendered_content(star: StarLLM, head: RenderedText, **more: Any) -> Content:
    ids, end = reader_of(star).chat_context(head)
    return Content(
        ids=as_ids(ids),
        text=head.text,
        literal=head.literal,
        end=None if end is None else end.as_dict(),
        **more,
    )


def raw_ids(star: StarLLM, text: str) -> list[int]:
    """Return the ids of a text without a template, after what the tokenizer writes first."""
    raw = reader_of(star).raw(text, "prompt")
    return with_prefix(prefix_ids(star.tokenizer), rendered_ids(star.tokenizer, raw))


def raw_content(star: StarLLM, text: str) -> Content:
    """Return the content that a text without a template makes."""
    reader = reader_of(star)
    raw = reader.raw(text, "context")
    ids, end = reader.raw_context(raw)
    return replace(
        unread(raw, raw=True), ids=as_ids(ids), end=None if end is None else end.as_dict()
    )


def unread(text: RenderedText, *, raw: bool = False) -> Content:
    """Return the content of a text before its token ids are known, to look it up by."""
    return Content(ids=as_ids([]), text=text.text, literal=text.literal, raw=raw)


def checked(star: StarLLM, ids: list[int]) -> list[int]:
    """Return token ids of a client, of which none is outside the vocabulary."""
    known: list[int] = checked_ids(ids, "prompt", star.runtime.handle.vocab_size).tolist()
    return known


def following(star: StarLLM, content: Content, more: RenderedText) -> list[int]:
    """Return the ids of a text that follows a context."""
    ids = content.ids[-400:].tolist()
    end = ContextEnd.of(content.end) if content.end else joining.end_of_ids(star.tokenizer, ids)
    return joining.following_ids(star.tokenizer, end, more)[0]


def going_on(star: StarLLM, content: Content, text: RenderedText) -> list[int] | None:
    """Return the ids that follow a context in a longer text; None where it ends inside a token."""
    assert content.text is not None, "it was found by its text"
    end = None if content.end is None else ContextEnd.of(content.end)
    more = text.slice(len(content.text))
    ids, is_joined = joining.following_ids(star.tokenizer, end, more)
    return ids if is_joined and end is not None else None


def after(star: StarLLM, content: Content, prompt: str | list[int]) -> list[int]:
    """Return the ids of a text, or of ids, that follow a context."""
    if isinstance(prompt, str):
        return following(star, content, reader_of(star).raw(prompt, "prompt"))
    held = [] if content.end is None else list(content.end["held_ids"])
    return held + checked(star, prompt)


def on_context(
    chats: Chats,
    star: StarLLM,
    content: Content,
    messages: list[Any],
    template_kwargs: dict[str, Any],
) -> Piece:
    """Return the query that messages are on the context of a chat."""
    content, opened = chats.of(star, content)
    if opened is None:
        raise InvalidInputError(
            "this context was made of token ids, of a part of a chat, or without a chat template,"
            " so that messages cannot follow it; ask with /v1/completions, or create it from text"
            " or messages"
        )
    text = chat.continue_context(
        star.tokenizer, opened, messages, template_kwargs or None, warned=set(chat.WARNINGS)
    )
    query_ids = following(star, content, reader_of(star).rendered(text))
    return Piece(content=content, query_ids=query_ids, rule="context")


def document(chats: Chats, star: StarLLM, source: Source) -> Content:
    """Return the content that a document makes: an open user message, where there is a template."""
    if source.after is not None:
        return _longer(chats, star, source.after, source.text or "")
    if source.token_ids is not None:
        return Content(ids=as_ids(checked(star, source.token_ids)))
    messages = source.messages
    if messages is None:
        if not getattr(star.tokenizer, "chat_template", None):
            return raw_content(star, source.text or "")
        messages = chat.user_message(source.text or "")
    return _chat_content(
        star, chat.open_context(star.tokenizer, messages, source.template_kwargs or None)
    )


def _chat_content(star: StarLLM, opened: ChatContext) -> Content:
    return _rendered_content(
        star,
        reader_of(star).rendered(opened.rendered),
        messages=opened.messages,
        template_kwargs=opened.template_kwargs,
    )


def _longer(chats: Chats, star: StarLLM, content: Content, more: str) -> Content:
    """Return a context that continues with a text."""
    if content.messages is not None:
        _, opened = chats.of(star, content)
        assert opened is not None, "it has messages"
        state = chat.extended(star.tokenizer, opened.as_dict(), more)
        assert state is not None, "it is a chat"
        return _chat_content(star, ChatContext.from_dict(state))
    reader = reader_of(star)
    end = None if content.end is None else ContextEnd.of(content.end)
    ids, new_end, _ = reader.extension(end, reader.raw(more, "extension"))
    return Content(
        ids=as_ids([*content.ids.tolist(), *ids]),
        end=None if new_end is None else new_end.as_dict(),
    )
