"""Prompts that go on with an answer: what was kept of its conversation is not computed again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.special import rendered_ids
from star_attention.hf.text.template import PROBES, ChatTemplate
from star_attention.serve.contexts.entry import Content
from star_attention.serve.contexts.keys import Scope, as_ids
from star_attention.serve.contexts.talks import Talk, Talks
from star_attention.serve.reading import Piece, going_on, raw_ids

RULE = "conversation"
_MOST_ENDINGS = 64
_LONGEST_ENDING = 4096
"""Characters of an ending that is remembered; templates write a line or two."""


@dataclass(frozen=True, kw_only=True)
class Continued:
    """A prompt that goes on with a conversation.

    Attributes:
        piece: the prompt, cut where the conversation was.
        tokens: its first tokens that are known: those of the context, and those that are kept.
    """

    piece: Piece
    tokens: int


def of_text(
    star: StarLLM, talks: Talks, scope: Scope, text: RenderedText, *, raw: bool, most_new: int
) -> Continued | None:
    """Return the cut of a rendered prompt where a conversation was that it goes on with.

    Args:
        star: the engine.
        talks: the conversations.
        scope: whose.
        text: the prompt.
        raw: True if no chat template wrote it.
        most_new: most tokens that may follow.
    """
    known: dict[int, list[int] | None] = {}
    found = []
    for talk in talks.begun(scope, text.text, raw=raw):
        key = id(talk.content)
        if key not in known:
            known[key] = _after(star, talk.content, text, raw=raw)
        if (ids := known[key]) is not None:
            found.append((talk, ids))
    return _best(found, most_new)


def of_ids(talks: Talks, scope: Scope, ids: list[int], *, most_new: int) -> Continued | None:
    """Return the cut of token ids where a conversation was that they go on with."""
    begun = talks.of_ids(scope, as_ids(ids))
    found = [(talk, ids[len(talk.content) :]) for talk in begun]
    return _best(found, most_new)


def _best(found: list[tuple[Talk, list[int]]], most_new: int) -> Continued | None:
    """Return the cut after which most tokens are known; None for none."""
    best: Continued | None = None
    for talk, ids in found:
        shared = talk.shared(ids)
        tokens = len(talk.content) + shared
        if not shared or len(ids) - shared > most_new or (best and tokens <= best.tokens):
            continue
        content: Content | None = talk.content
        query_ids = ids
        if is_first(talk.content):
            content, query_ids = None, talk.content.ids.tolist() + query_ids
        piece = Piece(content=content, query_ids=query_ids, rule=RULE)
        best = Continued(piece=piece, tokens=tokens)
    return best


def is_first(content: Content) -> bool:
    """True for a context that is the first token of a prompt which is read as a query."""
    return len(content) == 1 and content.text is None


def _after(star: StarLLM, content: Content, text: RenderedText, *, raw: bool) -> list[int] | None:
    """Return the ids after a context in a longer text; None where it does not begin so."""
    if content.text is not None:
        return going_on(star, content, text)
    whole = raw_ids(star, text.text) if raw else rendered_ids(star.tokenizer, text)
    size = len(content)
    return whole[size:] if whole[:size] == content.ids.tolist() else None


class Endings:
    """What a chat template writes after the last word of a user: the start of an answer."""

    def __init__(self) -> None:
        # By digests: schemas of tools may be as long as a book.
        self._known: dict[bytes, tuple[str, int]] = {}

    def of(self, star: StarLLM, template_kwargs: dict[str, Any]) -> tuple[str, int]:
        """Return the text, and the number of its tokens."""
        key = hashlib.sha256(json.dumps(template_kwargs, sort_keys=True).encode()).digest()
        if (known := self._known.get(key)) is not None:
            return known
        text = _start_of_answer(star, template_kwargs)
        ids = star.tokenizer(text, add_special_tokens=False).input_ids if text else []
        if len(text) <= _LONGEST_ENDING:
            if len(self._known) >= _MOST_ENDINGS:
                self._known.clear()
            self._known[key] = text, len(ids)
        return text, len(ids)


def _start_of_answer(star: StarLLM, template_kwargs: dict[str, Any]) -> str:
    probe = PROBES[0]
    template = ChatTemplate(star.tokenizer, template_kwargs)
    try:
        text = template.render([{"role": "user", "content": probe}])
    except InvalidInputError:
        # It wants other messages: nothing is known, and all of a prompt has to come again.
        return ""
    before, _, after = text.rpartition(probe)
    return after if before else ""
