"""What finished answers keep for prompts that go on with them: found by content, within bounds."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from star_attention.serve.contexts.entry import Content
from star_attention.serve.contexts.keys import Scope, TokenIds

_LEAST_TOKENS = 32
"""Tokens from which on a conversation is worth a forward of its own: other queries on a context are
read together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A prompt as later ones may go on with it.

    Attributes:
        scope: who may.
        content: what its context is made of.
        ids: its token ids after the context.
        text: where it was rendered from messages or is a text, the text after that of the context,
            up to `unsaid_tokens` before its end; None where its conversation is not looked for by
            text.
        raw: True if no chat template wrote the text.
        unsaid_tokens: its last tokens, after a user's last word, which the template may write
            otherwise once the answer is there.
    """

    scope: Scope
    content: Content
    ids: list[int]
    text: str | None = None
    raw: bool = False
    unsaid_tokens: int = 0

    @property
    def said_tokens(self) -> int:
        """Tokens after the context that a prompt repeats which goes on with this one."""
        return len(self.ids) - self.unsaid_tokens


@dataclass(kw_only=True, eq=False)
class Talk:
    """A conversation after its last answer.

    Attributes:
        first, last: its first and last prompt.
        content: what its context is made of.
        ids: token ids after the context: those of the last prompt, and of the answer.
        kept: their keys and values.
        nbytes: bytes of these.
        used_at: when it was last used.
    """

    first: Prompt
    last: Prompt
    content: Content
    ids: list[int]
    kept: Any
    nbytes: int
    used_at: float

    @property
    def scope(self) -> Scope:
        """Who may go on with it."""
        return self.last.scope

    @property
    def beginning(self) -> tuple[Scope, tuple[int, ...]]:
        """What a prompt repeats at least that has all which a client can still go on with."""
        return self.scope, tuple(self.ids[: max(self.last.said_tokens, 1)])

    def shared(self, ids: list[int]) -> int:
        """Return how many tokens after the context it shares with a prompt; 0 for another talk.

        A prompt that goes on with it repeats at least its first prompt. The prompt's last token is
        never shared: the answer comes from it.
        """
        most = len(ids) - 1
        least = max(min(self.first.said_tokens, most), _LEAST_TOKENS)
        return _shared(self.ids, ids, least, most)

    def is_said_by(self, other: Talk) -> bool:
        """True if another one has all that a client can still go on with."""
        least = max(self.last.said_tokens, 1)
        return _shared(self.ids, other.ids, least, len(other.ids)) > 0


def _shared(first: list[int], second: list[int], least: int, most: int) -> int:
    """Return how many of `most` ids both begin alike with; 0 for fewer than `least`, at least 1."""
    most = min(most, len(first))
    # Of many talks about a document, most differ where a question ends.
    if most < least or first[least - 1] != second[least - 1] or first[:least] != second[:least]:
        return 0
    pairs = zip(first[least:most], second[least:most], strict=True)
    return next((least + n for n, (one, other) in enumerate(pairs) if one != other), most)


_REASONS = ("room", "age", "context")


@dataclass(kw_only=True)
class TalkCounts:
    """What has happened since the start.

    Attributes:
        hits: prompts that went on with a conversation.
        dropped: conversations that were dropped: for room, for age, with their context.
    """

    hits: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_REASONS, 0))


class Talks:
    """Conversations that can be gone on with. Any thread may call.

    They are found by comparing all of their tokens, and never by another tenant or salt.

    Args:
        most: most conversations; 0 to keep none.
        most_bytes: most bytes of their keys and values.
        ttl: seconds without use after which one is dropped.
        clock: returns the time.
    """

    def __init__(
        self, most: int, most_bytes: int, ttl: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._most, self._most_bytes, self._ttl, self._clock = most, most_bytes, ttl, clock
        self._lock = threading.Lock()
        # The one used longest ago comes first.
        self._talks: dict[Talk, None] = {}
        # By their first tokens. Of others, whose place one may take that begins otherwise, by less.
        self._starts: dict[tuple[Scope, tuple[int, ...]], dict[Talk, None]] = {}
        self._short: dict[tuple[Scope, tuple[int, ...]], dict[Talk, None]] = {}
        # What they are on, by its identity, and how many are.
        self._contents: dict[int, tuple[Content, int]] = {}
        self._nbytes = 0
        self._counts = TalkCounts()

    @property
    def is_on(self) -> bool:
        """True if conversations are kept."""
        return self._most > 0

    def numbers(self) -> tuple[int, int, TalkCounts]:
        """Return the number of conversations, their bytes, and what has happened."""
        with self._lock:
            return len(self._talks), self._nbytes, copy.deepcopy(self._counts)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self._nbytes

    def add(self, prompt: Prompt, first: Prompt, kept: Any) -> None:
        """Keep the conversation after an answer, in place of those whose turns it repeats.

        One that takes more bytes than there are is not kept.

        Args:
            prompt: what was answered.
            first: the first prompt of its conversation.
            kept: token ids after the context (`ids`), with their keys and values, of `nbytes`.
        """
        nbytes: int = kept.nbytes
        if nbytes > self._most_bytes:
            return
        with self._lock:
            alike = self._starts.get(_start(prompt.scope, kept.ids), {})
            same = self._on(prompt, alike | self._short_in(prompt.scope, kept.ids))
            talk = Talk(
                first=first,
                last=prompt,
                # One array for all talks about a document.
                content=self._known_content(prompt.content),
                ids=kept.ids,
                kept=kept,
                nbytes=nbytes,
                used_at=self._clock(),
            )
            for each in same:
                if each.is_said_by(talk):
                    self._remove(each)
            self._add(talk)
            self._drop_excess(self._most_bytes)

    def begun(self, scope: Scope, text: str, *, raw: bool) -> list[Talk]:
        """Return the conversations whose first prompt a rendered prompt repeats."""
        with self._lock:
            talks = [talk for talk in self._talks if talk.scope == scope]
        contexts: dict[int, bool] = {}
        begun = []
        for talk in talks:
            opening, before = talk.first.text, talk.content.text or ""
            if opening is None or talk.first.raw != raw:
                continue
            key = id(talk.content)
            if key not in contexts:
                contexts[key] = text.startswith(before)
            if contexts[key] and text.startswith(opening, len(before)):
                begun.append(talk)
        return begun

    def of_ids(self, scope: Scope, ids: TokenIds) -> list[Talk]:
        """Return the conversations whose context a prompt of token ids begins with."""
        with self._lock:
            talks = [talk for talk in self._talks if talk.scope == scope]
        return [talk for talk in talks if _begins_with(ids, talk.content.ids)]

    def after(self, prompt: Prompt) -> tuple[Talk | None, int]:
        """Return the conversation on a prompt's context that it goes on with, and shared tokens.

        The one that it shares most with; None, and 0, for none.
        """
        with self._lock:
            talks = self._on(prompt, self._starts.get(_start(prompt.scope, prompt.ids), {}))
        shared = [talk.shared(prompt.ids) for talk in talks]
        most = max(shared, default=0)
        return (talks[shared.index(most)], most) if most else (None, 0)

    def use(self, talk: Talk) -> None:
        """Note that a prompt goes on with a conversation."""
        with self._lock:
            self._counts.hits += 1
            if talk in self._talks:
                talk.used_at = self._clock()
                del self._talks[talk]
                self._talks[talk] = None

    def drop_old(self) -> None:
        """Drop what nobody has gone on with for too long."""
        now = self._clock()
        with self._lock:
            # Others were used later than the first that is not old.
            old = takewhile(lambda talk: now >= talk.used_at + self._ttl, self._talks)
            self._drop(list(old), "age")

    def drop_of(self, tenant: str, ids: TokenIds) -> None:
        """Drop the conversations on a tenant's context, which goes."""
        with self._lock:
            gone = [
                talk
                for talk in self._talks
                if talk.scope.tenant == tenant and np.array_equal(talk.content.ids, ids)
            ]
            self._drop(gone, "context")

    def make_room(self, most_bytes: int) -> bool:
        """Drop the oldest until the others take no more bytes; False if there was no need."""
        with self._lock:
            before = len(self._talks)
            self._drop_excess(most_bytes)
            return len(self._talks) < before

    def _on(self, prompt: Prompt, among: Iterable[Talk]) -> list[Talk]:
        """Return those conversations that are on a prompt's context, which talks share."""
        known = {id(prompt.content): True}
        talks = []
        for talk in among:
            if talk.scope != prompt.scope:
                continue
            key = id(talk.content)
            if key not in known:
                known[key] = np.array_equal(talk.content.ids, prompt.content.ids)
            if known[key]:
                talks.append(talk)
        return talks

    def _known_content(self, content: Content) -> Content:
        """Return the content of conversations on an equal context, so that all share one array."""
        if id(content) in self._contents:
            return content
        equal = (
            each
            for each, _ in self._contents.values()
            if each.text == content.text and np.array_equal(each.ids, content.ids)
        )
        return next(equal, content)

    def _add(self, talk: Talk) -> None:
        self._talks[talk] = None
        self._starts.setdefault(_start(talk.scope, talk.ids), {})[talk] = None
        if talk.last.said_tokens < _LEAST_TOKENS:
            self._short.setdefault(talk.beginning, {})[talk] = None
        content, number = self._contents.get(id(talk.content), (talk.content, 0))
        self._contents[id(content)] = content, number + 1
        self._nbytes += talk.nbytes

    def _short_in(self, scope: Scope, ids: list[int]) -> dict[Talk, None]:
        """Return the conversations of less than a start that ids begin with."""
        found: dict[Talk, None] = {}
        for tokens in range(1, _LEAST_TOKENS):
            found |= self._short.get((scope, tuple(ids[:tokens])), {})
        return found

    def _drop_excess(self, most_bytes: int) -> None:
        while self._talks and (self._nbytes > most_bytes or len(self._talks) > self._most):
            self._drop([next(iter(self._talks))], "room")

    def _drop(self, talks: list[Talk], reason: str) -> None:
        for talk in talks:
            self._remove(talk)
            self._counts.dropped[reason] += 1

    def _remove(self, talk: Talk) -> None:
        del self._talks[talk]
        for table, key in (
            (self._starts, _start(talk.scope, talk.ids)),
            (self._short, talk.beginning),
        ):
            if talk in table.get(key, {}):
                del table[key][talk]
                if not table[key]:
                    del table[key]
        content, number = self._contents.pop(id(talk.content))
        if number > 1:
            self._contents[id(content)] = content, number - 1
        self._nbytes -= talk.nbytes


def _start(scope: Scope, ids: list[int]) -> tuple[Scope, tuple[int, ...]]:
    """Return what two prompts have in common of which one goes on with the other's talk."""
    return scope, tuple(ids[:_LEAST_TOKENS])


def _begins_with(ids: TokenIds, begin: TokenIds) -> bool:
    return len(ids) > len(begin) and np.array_equal(ids[: len(begin)], begin)
