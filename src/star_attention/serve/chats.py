"""The chats that kept contexts are, opened once and remembered within a budget."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace

from star_attention.engine import StarLLM
from star_attention.hf.text import chat
from star_attention.hf.text.conversation import ChatContext
from star_attention.serve.contexts.entry import Content
from star_attention.serve.values import bytes_of

_PROBE = "A document."
"""Shows what a chat template writes before one."""
_HELD_BESIDES = 1024
"""Bytes that a chat takes beside its values."""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What a content is.

    Attributes:
        of: the content.
        other: one with messages in its place; None where it has them, or is not a chat.
        chat: the chat; None for what is none.
        nbytes: about the bytes of the last two, with those that are the content's own.
    """

    of: weakref.ref[Content]
    other: Content | None
    chat: ChatContext | None
    nbytes: int


class Chats:
    """The chats that contents are: a template takes long for a book, and most are asked again.

    Any thread may call. A chat goes with its content, and before that if others take its bytes: it
    is opened again then.

    Args:
        most_bytes: most bytes of all chats; those used longest ago leave first.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        # By the content's identity; the one used longest ago comes first. Where garbage is
        # collected while the lock is held, a content may go in the same thread.
        self._lock = threading.RLock()
        self._opened: dict[int, _Opened] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all chats."""
        with self._lock:
            return sum(opened.nbytes for opened in list(self._opened.values()))

    def of(self, star: StarLLM, content: Content) -> tuple[Content, ChatContext | None]:
        """Return a content, with messages if it is a document's, and its chat; None for no chat.

        Of a chat that was cut after its document the text is known and not its messages. Here the
        document becomes a message again, if the chat template writes the same text for it.

        Args:
            star: the engine whose tokenizer renders chats.
            content: what a context is made of.
        """
        key = id(content)
        with self._lock:
            opened = self._opened.pop(key, None)
            if opened is not None and opened.of() is content:
                self._opened[key] = opened
            else:
                opened = None
        if opened is None:
            opened = self._open(star, content)
            if opened.nbytes <= self._most_bytes:
                with self._lock:
                    self._opened[key] = opened
                    self._drop_excess()
        return content if opened.other is None else opened.other, opened.chat

    def _open(self, star: StarLLM, content: Content) -> _Opened:
        key = id(content)
        other, found = _chat_of(star, content)
        if found is not None and found.head == content.text:
            # One text instead of two equal ones.
            found = replace(found, head=content.text)
        of = weakref.ref(content, lambda _: self._drop(key))
        nbytes = _HELD_BESIDES + (0 if found is None else bytes_of(*vars(found).values()))
        return _Opened(of=of, other=other, chat=found, nbytes=nbytes)

    def _drop(self, key: int) -> None:
        with self._lock:
            self._opened.pop(key, None)

    def _drop_excess(self) -> None:
        for key in list(self._opened):
            if self.nbytes <= self._most_bytes:
                break
            self._drop(key)


def _chat_of(star: StarLLM, content: Content) -> tuple[Content | None, ChatContext | None]:
    """Return the content with messages in the place of one without, and the chat."""
    if content.messages is not None:
        opened = chat.open_context(star.tokenizer, content.messages, content.template_kwargs)
        return None, opened
    if content.text is None or content.raw:
        return None, None
    before = chat.open_context(star.tokenizer, chat.user_message(_PROBE)).head.partition(_PROBE)[0]
    document = content.text.removeprefix(before)
    if not document.strip():
        return None, None
    opened = chat.open_context(star.tokenizer, chat.user_message(document))
    if opened.head != content.text:
        return None, None
    kwargs = opened.template_kwargs
    return replace(content, messages=opened.messages, template_kwargs=kwargs), opened
