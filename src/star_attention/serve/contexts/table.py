"""What requests and the engine's thread share: the registry under its lock, and what they count."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from star_attention.errors import InvalidInputError
from star_attention.serve.contexts.entry import Entry
from star_attention.serve.contexts.folder import StoreFolder
from star_attention.serve.contexts.keys import KeyMaker, TokenIds
from star_attention.serve.contexts.registry import Registry
from star_attention.serve.contexts.talks import Talks

_TALK_SHARE = 8
"""Conversations take one part in so many of the device's bytes: they are made again more quickly
than contexts."""


class ContextJob(Protocol):
    """A context that is encoded, or read from disk, a piece at a time."""

    @property
    def done(self) -> bool:
        """True once there is a result, or an error."""

    @property
    def tokens(self) -> int:
        """Tokens encoded so far."""

    def advance(self) -> None:
        """Do a piece, unless the engine's steps do."""

    def result(self) -> Any:
        """Return the context, or raise why there is none."""

    def cancel(self) -> None:
        """Stop, and free what was computed."""


class ParkJob(Protocol):
    """A context that is copied to host memory, a piece at a time."""

    @property
    def done(self) -> bool:
        """True once all of it is there."""

    def advance(self) -> None:
        """Copy a piece; raises if there is too little memory."""

    def result(self) -> Any:
        """Return the copy: `nbytes`, and `on_host()`, a context that can be saved."""

    def cancel(self) -> None:
        """Drop what is left of the work."""


class Encoder(Protocol):
    """Makes contexts. Only the engine's thread calls it, apart from the first two methods."""

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of a context's keys and values, before it is encoded."""

    def block_size(self, tokens: int) -> int:
        """Return the tokens of a block of a context of that length."""

    def start(self, ids: TokenIds, reuse: Any) -> ContextJob:
        """Begin to encode; blocks that the context `reuse`, if any, shares are copied."""

    def load(self, path: Path, ids: TokenIds) -> ContextJob:
        """Begin to read and verify a saved context.

        The result, or this call, raises `ContextFileError` for a file that cannot be used, or that
        holds other tokens.
        """

    def host_bytes(self, context: Any) -> int:
        """Return the bytes that a context takes in host memory."""

    def park(self, context: Any) -> ParkJob:
        """Begin to copy a context to host memory."""

    def bring_back(self, parked: Any) -> ContextJob:
        """Begin to copy a context back from host memory."""

    def free_memory(self) -> None:
        """Give memory back that nothing refers to."""


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """How much is kept, and how long.

    Attributes:
        device_bytes: most bytes of keys and values on the device, those of conversations included.
        pinned_bytes: most bytes of pinned contexts; None for half of `device_bytes`.
        host_bytes: most bytes of keys and values in host memory; 0 for none, as where the device
            has no memory of its own.
        disk_bytes: most bytes of keys and values in the folder.
        cold_tokens: most tokens of contexts whose ids alone are kept.
        cold_contexts: most of these contexts: all of them are looked at often, however short.
        ttl: seconds without use after which a context expires; None for never.
        linger_s: seconds that an encode goes on for after the last request that waited for it.
        talks: most conversations that can be gone on with; 0 for none.
        talk_ttl: seconds without use after which one is dropped.
    """

    device_bytes: int
    pinned_bytes: int | None = None
    host_bytes: int = 0
    disk_bytes: int = 64 * 2**30
    cold_tokens: int = 64 * 2**20
    cold_contexts: int = 10_000
    ttl: float | None = None
    linger_s: float = 30.0
    talks: int = 0
    talk_ttl: float = 1800.0

    def __post_init__(self) -> None:
        if self.pinned_bytes is not None and self.pinned_bytes > self.device_bytes:
            raise InvalidInputError(
                f"{self.pinned_bytes:,} bytes cannot be pinned of {self.device_bytes:,} in all;"
                " lower the one, or raise the other"
            )

    @property
    def pin_limit(self) -> int:
        """Most bytes of pinned contexts."""
        return self.device_bytes // 2 if self.pinned_bytes is None else self.pinned_bytes

    @property
    def talk_bytes(self) -> int:
        """Most bytes of conversations."""
        return self.device_bytes // _TALK_SHARE


@dataclass
class Counts:
    """What has happened since the start.

    Attributes:
        found: requests by what they found.
        missed: misses by reason.
        encodes: encodes by how they ended: done, failed, canceled.
        evicted: contexts that left the device or host memory, by where they went: host, disk, cold,
            gone.
        encoded_tokens: tokens of finished encodes, with `reused_tokens` that were copied.
        reloads: contexts that came back from disk.
        returns: contexts that came back from host memory.
        again: contexts that were encoded again after they had been evicted.
        unwritten: contexts that could not be written.
        out_of_memory: times that memory ran out.
    """

    found: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    encodes: Counter[str] = field(default_factory=Counter)
    evicted: Counter[str] = field(default_factory=Counter)
    encoded_tokens: int = 0
    reused_tokens: int = 0
    reloads: int = 0
    returns: int = 0
    again: int = 0
    unwritten: int = 0
    out_of_memory: int = 0

    def count(self, outcome: str, reason: str) -> None:
        """Count a request."""
        self.found[outcome] += 1
        if reason:
            self.missed[reason] += 1


class Table:
    """The registry and what belongs to it; whoever reads or changes it holds `lock`.

    Attributes:
        queue: contexts that are to be encoded or brought back, the first one first.
        waiting: what waits for a context to be on the device.
        changed: contexts to look at again; `all_changed` is True if they all are.
        talks: what answers on the contexts keep.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: StoreSettings,
        *,
        keys: KeyMaker,
        folder: StoreFolder | None,
        clock: Callable[[], float],
        changed: Callable[[str], None],
        wake: Callable[[], None],
    ) -> None:
        self.encoder, self.settings = encoder, settings
        self.keys, self.folder, self.clock = keys, folder, clock
        self.lock = threading.RLock()
        self.registry = Registry()
        self.queue: list[Entry] = []
        self.waiting: dict[Entry, list[Future[Any]]] = {}
        self.counts = Counts()
        self.talks = Talks(settings.talks, settings.talk_bytes, settings.talk_ttl, clock)
        self.changed: dict[Entry, None] = {}
        self.all_changed = True
        self._report, self._wake = changed, wake
        self._changes: dict[str, None] = {}
        self._resolved: list[tuple[Future[Any], Any, BaseException | None]] = []

    def wake(self, *entries: Entry) -> None:
        """Tell the engine's thread that there may be something to do; from any thread.

        Args:
            entries: contexts to look at again; none for all.
        """
        with self.lock:
            self.changed.update(dict.fromkeys(entries))
            self.all_changed = self.all_changed or not entries
        self._wake()

    @property
    def has_changed(self) -> bool:
        """True if contexts are to be looked at again."""
        return self.all_changed or bool(self.changed)

    def take_changed(self) -> list[Entry]:
        """Return the contexts to look at again, once."""
        entries = list(self.registry if self.all_changed else self.changed)
        self.changed.clear()
        self.all_changed = False
        return entries

    def resolve(self, entry: Entry, error: BaseException | None = None) -> None:
        """Give those who wait for a context the context, or an error, at the next `deliver`."""
        self.note(entry)
        for future in self.waiting.pop(entry, []):
            self._resolved.append((future, entry.context, error))

    def note(self, entry: Entry) -> None:
        """Report a change of a context at the next `deliver`."""
        self._changes[entry.id] = None

    def deliver(self) -> None:
        """Call what waits. The lock must not be held: callbacks may come back here."""
        with self.lock:
            resolved, self._resolved = self._resolved, []
            changes, self._changes = self._changes, {}
        for future, context, error in resolved:
            if not future.set_running_or_notify_cancel():
                continue
            if error is None:
                future.set_result(context)
            else:
                future.set_exception(error)
        for id in changes:
            self._report(id)

    def forget(self, entry: Entry) -> None:
        """Drop all of a context, its files, and the conversations on it."""
        self.forget_talks(entry)
        entry.context, entry.parked, entry.has_file = None, None, False
        self.registry.forget(entry)
        if entry in self.queue:
            self.queue.remove(entry)
        self.remove_files(entry)
        self.note(entry)

    def expire(self, entry: Entry) -> None:
        """Drop a context that nobody has used for too long; a listed one keeps its id."""
        if not entry.listed:
            self.forget(entry)
            return
        self.forget_talks(entry)
        self.registry.expire(entry)
        entry.has_file = False
        self.remove_files(entry)
        self.note(entry)

    def forget_talks(self, entry: Entry) -> None:
        """Drop the conversations on a context."""
        if entry.content is not None:
            self.talks.drop_of(entry.scope.tenant, entry.content.ids)

    def remove_files(self, entry: Entry) -> None:
        """Remove a context's files."""
        if self.folder is not None:
            self.folder.remove(entry)
