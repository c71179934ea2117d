"""The table of all kept contexts: by id, by content, by beginning."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from star_attention.hf.text.rendered import shared_prefix
from star_attention.serve.contexts.entry import Content, Entry, Location, Status
from star_attention.serve.contexts.keys import Scope, TokenIds
from star_attention.serve.refusals import RefusalError

_BEGINNING = 256
"""Characters that texts begin alike with at least, if they are to share anything."""
_SAME_END = 64
"""Tokens at the end of two contexts that are hardly the same by chance."""

Spans = tuple[tuple[int, int], ...]

MOST_EXPIRED = 1000
"""Expired contexts whose ids are remembered, so that a client learns what became of them."""


class Registry:
    """All contexts. It has no lock of its own: whoever uses it holds the store's.

    A request is compared with contexts of its own scope alone: how long that takes tells nothing
    about others'.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, Entry] = {}
        self._by_key: dict[bytes, list[Entry]] = {}
        self._by_scope: dict[Scope, dict[str, Entry]] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, entry: Entry) -> None:
        """Add a context."""
        self._by_id[entry.id] = entry
        self._by_key.setdefault(entry.key, []).append(entry)
        self._by_scope.setdefault(entry.scope, {})[entry.id] = entry

    def forget(self, entry: Entry) -> None:
        """Remove a context."""
        self._by_id.pop(entry.id, None)
        self._unindex(entry)

    def expire(self, entry: Entry) -> None:
        """Keep a context's id alone, which a client knows."""
        self._unindex(entry)
        entry.status, entry.content = Status.EXPIRED, None
        entry.context = entry.parked = None
        expired = [other for other in self if other.status is Status.EXPIRED]
        expired.sort(key=lambda entry: entry.last_used_at)
        for oldest in expired[: max(0, len(expired) - MOST_EXPIRED)]:
            del self._by_id[oldest.id]

    def get(self, tenant: str, id: str) -> Entry:
        """Return a tenant's context.

        Raises:
            RefusalError: it has none of this id; another tenant's is none either.
        """
        entry = self._by_id.get(id)
        if entry is None or entry.scope.tenant != tenant or entry.deleted:
            raise RefusalError(
                f"there is no context {id[:80]}; list them with GET /v1/contexts, or create it",
                code="context_not_found",
                status=404,
            )
        return entry

    def of_tenant(self, tenant: str) -> list[Entry]:
        """Return a tenant's contexts, the newest first."""
        own = [entry for entry in self if entry.scope.tenant == tenant and not entry.deleted]
        return sorted(own, key=lambda entry: (entry.created_at, entry.id), reverse=True)

    def find(self, key: bytes, scope: Scope, ids: TokenIds) -> Entry | None:
        """Return the context of these tokens; equal keys alone do not make it the same."""
        for entry in self._by_key.get(key, ()):
            if entry.scope != scope or entry.deleted or entry.content is None:
                continue
            if np.array_equal(entry.content.ids, ids):
                return entry
        return None

    def of_text(self, scope: Scope, text: Content) -> Content | None:
        """Return what is known of a text, so that it need not be tokenized again.

        Args:
            scope: whose contexts may tell.
            text: a content without token ids.
        """
        for entry in self._within(scope):
            known = entry.content
            # There may be thousands, and hardly any has this text: all else is asked of few.
            if known is None or known.text != text.text or entry.deleted:
                continue
            if (known.literal, known.raw) == (text.literal, text.raw):
                return known
        return None

    def prefix_of(self, scope: Scope, content: Content) -> Entry | None:
        """Return the longest context that `content` begins with, and goes on after.

        Its keys and values are there, or about to be. Texts are compared where both have one, token
        ids where one has none.
        """
        begun = (
            entry
            for entry in self._within(scope)
            if entry.content is not None
            and _begins_with(content, entry.content)
            and entry.keep
            and _is_living(entry)
        )
        return max(begun, key=lambda entry: entry.tokens, default=None)

    def shared_text(self, scope: Scope, text: Content) -> int:
        """Return the most characters that a text and a kept context begin alike with.

        Args:
            scope: whose contexts count.
            text: a content without token ids.
        """
        alike = (
            entry.content
            for entry in self._within(scope)
            if entry.content is not None
            and _begin_alike(text, entry.content)
            and entry.keep
            and _is_living(entry)
        )
        return max((_shared_text(text, content) for content in alike), default=0)

    def nearest(self, scope: Scope, ids: TokenIds, block_size: int) -> tuple[Entry | None, int]:
        """Return the context on the device that has most blocks of `ids`, and its tokens in them.

        Blocks count where the beginning, which all blocks see, is the same.
        """
        best: Entry | None = None
        most = 0
        for entry in self._living(scope):
            if entry.context is None or entry.content is None:
                continue
            tokens = shared_tokens(entry.content.ids, ids, block_size)
            if tokens > most:
                best, most = entry, tokens
        return best, most

    def ends_alike(self, scope: Scope, ids: TokenIds) -> bool:
        """True if a context ends like this one, so that what differs is before: a date, say."""
        last = ids[-_SAME_END:]
        return len(last) == _SAME_END and any(
            entry.content is not None and np.array_equal(entry.content.ids[-_SAME_END:], last)
            for entry in self._living(scope)
        )

    def _within(self, scope: Scope) -> list[Entry]:
        return list(self._by_scope.get(scope, {}).values())

    def _living(self, scope: Scope) -> Iterator[Entry]:
        return filter(_is_living, self._within(scope))

    def _unindex(self, entry: Entry) -> None:
        same, own = self._by_key.get(entry.key, []), self._by_scope.get(entry.scope, {})
        if entry in same:
            same.remove(entry)
        own.pop(entry.id, None)
        if not same:
            self._by_key.pop(entry.key, None)
        if not own:
            self._by_scope.pop(entry.scope, None)


def _is_living(entry: Entry) -> bool:
    """True for a context whose keys and values are there, or about to be."""
    is_there = entry.status in (Status.QUEUED, Status.ENCODING) or (
        entry.location in (Location.DEVICE, Location.HOST, Location.DISK)
    )
    return is_there and not entry.deleted


def shared_tokens(old: TokenIds, new: TokenIds, block_size: int) -> int:
    """Return the tokens in blocks that two contexts share; 0 where their first blocks differ."""
    blocks = min(len(old), len(new)) // block_size
    if not blocks:
        return 0
    shape = (blocks, block_size)
    both = old[: blocks * block_size].reshape(shape), new[: blocks * block_size].reshape(shape)
    if not np.array_equal(both[0][0], both[1][0]):
        return 0
    return int((both[0] == both[1]).all(axis=1).sum()) * block_size


def _begins_with(whole: Content, begin: Content) -> bool:
    if whole.text is not None and begin.text is not None:
        size = len(begin.text)
        return (
            len(whole.text) > size
            and whole.raw == begin.raw
            and whole.text.startswith(begin.text)
            and _spans_before(whole.literal, size) == begin.literal
        )
    size = len(begin)
    return len(whole) > size and np.array_equal(whole.ids[:size], begin.ids)


def _begin_alike(first: Content, second: Content) -> bool:
    """False where two texts share nothing: most begin otherwise, which is seen at once."""
    if first.text is None or second.text is None or first.raw != second.raw:
        return False
    return first.text[:_BEGINNING] == second.text[:_BEGINNING]


def _shared_text(first: Content, second: Content) -> int:
    assert first.text is not None and second.text is not None, "they begin alike"
    size = len(shared_prefix((first.text, second.text)))
    same = _spans_before(first.literal, size) == _spans_before(second.literal, size)
    return size if same else 0


def _spans_before(spans: Spans, end: int) -> Spans:
    return tuple((low, min(high, end)) for low, high in spans if low < end)
