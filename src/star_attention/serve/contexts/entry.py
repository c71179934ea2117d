"""One kept context: what it is made of, where it is, and who uses it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from star_attention.serve.contexts.keys import Scope, TokenIds


class Status(StrEnum):
    """How far a context is."""

    QUEUED = "queued"
    ENCODING = "encoding"
    READY = "ready"
    FAILED = "failed"
    EXPIRED = "expired"


class Location(StrEnum):
    """Where keys and values are; a cold context has its token ids alone, and is encoded again."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    COLD = "cold"


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a context is made of. It never changes.

    Attributes:
        ids: its token ids.
        text: the text that these are of, as the chat template wrote it; None where a client gave
            token ids. What is held back of it for the queries (`hf/text/joining.py`) is in it.
        raw: True if no chat template wrote the text.
        literal: spans of the text that users wrote, as in `RenderedText`.
        end: its end, as a `ContextEnd` describes itself; None where queries are token ids.
        messages: the chat messages that it was rendered from; None for text without a template.
        template_kwargs: what the template read beside them.
    """

    ids: TokenIds
    text: str | None = None
    raw: bool = False
    literal: tuple[tuple[int, int], ...] = ()
    end: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A context that a request needs.

    Attributes:
        scope: who may find it.
        content: what it is made of.
        keep: False for a context of this request alone, which is dropped after its last user.
        ttl: the least seconds without use after which it may expire; None for the server's own.
    """

    scope: Scope
    content: Content
    keep: bool = True
    ttl: float | None = None


@dataclass(frozen=True, kw_only=True)
class ContextView:
    """A context as its tenant sees it, at one moment.

    Attributes:
        id: its name in requests.
        status, location: see `Status` and `Location`; location is None until it is encoded.
        done, total: tokens encoded so far, and in all.
        bytes: bytes of its keys and values; None before they are known.
        created_at, last_used_at, expires_at: seconds since 1970; expires_at is None for never.
        hits: requests that found it there.
        error: why it failed; None if it did not.
    """

    id: str
    status: Status
    location: Location | None
    done: int
    total: int
    bytes: int | None
    created_at: float
    last_used_at: float
    expires_at: float | None
    ttl: float | None
    pinned: bool
    name: str | None
    hits: int
    error: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `/v1/contexts` answers with."""
        fields = asdict(self)
        done, total = fields.pop("done"), fields.pop("total")
        times = {
            name: None if fields[name] is None else math.floor(fields[name])
            for name in ("created_at", "last_used_at", "expires_at")
        }
        return {
            **fields,
            **times,
            "object": "context",
            "tokens": total,
            "progress": {"done": done, "total": total},
        }


@dataclass(kw_only=True, eq=False)
class Entry:
    """A context of the registry; only code that holds the store's lock may touch it.

    Attributes:
        id, key, scope: its id, and what it is found by.
        content: what it is made of; None once it has expired.
        tokens: number of its tokens.
        nbytes: bytes of its keys and values, as estimated until it is encoded.
        listed: True if a client made it by itself, so that its id is known; others come and go with
            requests.
        keep: False to drop it after its last user.
        ttl: seconds without use after which it expires; None for never.
        marked: True if a request asked to keep it for a while, or came for it after it had gone.
        context: its keys and values on the device; None if they are not there.
        parked: those in host memory; None if they are not there. They may be at both places.
        has_file: True if they are in the store's folder.
        users: requests and work that need it. It is not dropped while there are any.
        deleted: True if it is to go after its last user, and not to be found before.
        linger_until: when an encode that nobody waits for any more is canceled.
        retried: True if its encode ran out of memory before.
        writing: True while its file is written, or while it is copied to host memory.
        loading: True while it comes back to the device.
        write_after: when it may be written, by the store's clock: later after that failed, and
            never after it made room on disk, until a client says how to keep it.
        unparkable: True if moving it to host memory failed, likewise.
        was_ready: True if it was encoded before, and is encoded again.
    """

    id: str
    key: bytes
    scope: Scope
    content: Content | None
    tokens: int
    nbytes: int
    created_at: float
    last_used_at: float
    listed: bool = False
    keep: bool = True
    ttl: float | None = None
    marked: bool = False
    pinned: bool = False
    name: str | None = None
    hits: int = 0
    status: Status = Status.QUEUED
    done: int = 0
    error: Exception | None = None
    context: Any = None
    parked: Any = None
    has_file: bool = False
    users: int = 0
    deleted: bool = False
    linger_until: float | None = None
    retried: bool = False
    writing: bool = False
    loading: bool = False
    write_after: float = 0.0
    unparkable: bool = False
    was_ready: bool = False

    @property
    def location(self) -> Location | None:
        """Where its keys and values are; None before it was encoded, and afterwards if it is gone.

        A cold context that is encoded again has none either.
        """
        if self.status is not Status.READY:
            return None
        if self.context is not None:
            return Location.DEVICE
        if self.parked is not None:
            return Location.HOST
        return Location.DISK if self.has_file else Location.COLD

    @property
    def is_pending(self) -> bool:
        """True if it is encoded, or waits for it."""
        return self.status in (Status.QUEUED, Status.ENCODING)

    @property
    def expires_at(self) -> float | None:
        """When it expires if nobody uses it before; None for never."""
        return None if self.ttl is None or self.pinned else self.last_used_at + self.ttl

    @property
    def worth_keeping(self) -> bool:
        """True if it goes to disk: somebody asked for it by itself, or again."""
        is_wanted = self.listed or self.pinned or self.marked or self.hits > 0
        return self.keep and is_wanted and not self.deleted

    def is_expired(self, now: float) -> bool:
        """True if nobody has used it for too long, nor does now."""
        idle = not self.users and not self.writing and not self.is_pending
        is_kept = self.status is not Status.EXPIRED
        return idle and is_kept and self.expires_at is not None and now >= self.expires_at

    def touch(self, now: float) -> None:
        """Note a use."""
        self.last_used_at = max(now, self.last_used_at)

    def view(self) -> ContextView:
        """Return what its tenant sees of it."""
        is_known = self.status is Status.READY
        return ContextView(
            id=self.id,
            status=self.status,
            location=self.location,
            done=self.tokens if is_known else self.done,
            total=self.tokens,
            bytes=self.nbytes if is_known else None,
            created_at=self.created_at,
            last_used_at=self.last_used_at,
            expires_at=self.expires_at,
            ttl=self.ttl,
            pinned=self.pinned,
            name=self.name,
            hits=self.hits,
            error=None if self.error is None else str(self.error),
        )
