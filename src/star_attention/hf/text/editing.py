"""Edits of what a context was made of: a text, the content of a chat message, or token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text.checks import checked_text
from star_attention.hf.text.conversation import ChatContext
from star_attention.hf.text.messages import Message, parts, texts
from star_attention.hf.text.tokens import checked_ids

_NEW_VERSION = "encode the new version with reuse=context"


def edited_text(text: str, start: Any, stop: Any, new: Any) -> str:
    """Return a text with the characters `start..stop` replaced.

    Raises:
        InvalidInputError: a place outside of the text, or a replacement that is no text.
    """
    if not isinstance(new, str):
        raise InvalidInputError(
            f"this context holds text, and got a replacement of type {type(new).__name__}; give a"
            f" str, or {_NEW_VERSION}"
        )
    _check_place(start, stop, len(text), "characters")
    return text[:start] + checked_text(new, "the replacement") + text[stop:]


def edited_ids(ids_L: Tensor, start: Any, stop: Any, new: Any, vocab_size: int) -> Tensor:
    """Return token ids with the tokens `start..stop` replaced.

    Raises:
        InvalidInputError: a place outside of the context, or a text as the replacement.
        TokenError: ids outside of the vocabulary.
    """
    if isinstance(new, str) and new:
        raise InvalidInputError(
            "this context holds token ids and no text, got a str to replace some of them; give"
            f" token ids, or {_NEW_VERSION}"
        )
    _check_place(start, stop, len(ids_L), "tokens")
    # Nothing is a way to delete.
    is_empty = isinstance(new, (str, list, tuple, Tensor)) and len(new) == 0
    new_N = ids_L[:0] if is_empty else checked_ids(new, "replacement", vocab_size)
    return torch.cat([ids_L[:start], new_N, ids_L[stop:]])


def edited_messages(chat: ChatContext, start: Any, stop: Any, new: Any) -> list[Message]:
    """Return the messages of a chat with characters of the last message's text replaced.

    Raises:
        InvalidInputError: a message that is not one text, or as for `edited_text`.
    """
    last = chat.messages[-1]
    contents = texts(last)
    if len(contents) != 1:
        has = "no text" if not contents else f"{len(contents)} texts"
        raise InvalidInputError(
            f"the last message of this chat context (role {quote(last['role'])}) has {has}; only"
            f" one text can be edited: {_NEW_VERSION}"
        )
    text = edited_text(contents[0], start, stop, new)
    content: Any = text
    if isinstance(last["content"], list):
        content = [{**last["content"][0], "text": text}]
    if chat.question is not None:
        content = [*parts(content), *parts(chat.question)]
    return [*chat.messages[:-1], {**last, "content": content}]


def _check_place(start: Any, stop: Any, length: int, unit: str) -> None:
    if any(type(place) is not int for place in (start, stop)):
        raise InvalidInputError(
            f"an edit from {quote(start)} to {quote(stop)}: expected two integers, got"
            f" {type(start).__name__} and {type(stop).__name__}; count {unit}"
        )
    if not 0 <= start <= stop <= length:
        raise InvalidInputError(
            f"an edit from {start:,} to {stop:,} lies outside of the context's {length:,} {unit};"
            f" give 0 <= start <= stop <= {length:,}"
        )
