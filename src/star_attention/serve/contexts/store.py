"""`ContextStore`: what requests ask for, and what the engine's thread does about it."""

from __future__ import annotations

import copy
import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from star_attention.errors import quote
from star_attention.serve.contexts.entry import (
    Content,
    ContextView,
    Entry,
    Location,
    Status,
    Wanted,
)
from star_attention.serve.contexts.finder import Finder
from star_attention.serve.contexts.folder import StoreFolder
from star_attention.serve.contexts.keeper import Keeper
from star_attention.serve.contexts.keys import KeyMaker, Scope
from star_attention.serve.contexts.lease import Lease, Outcome
from star_attention.serve.contexts.shelf import Shelf
from star_attention.serve.contexts.table import Counts, Encoder, StoreSettings, Table
from star_attention.serve.contexts.talks import Talks
from star_attention.serve.refusals import RefusalError

UNCHANGED: Any = object()
"""Stands for a field that `update` leaves as it is."""

_LONGEST_NAME = 200
_SECRET_BYTES = 32


class ContextStore:
    """Contexts of a server: each encoded once, found by content or id, evicted by use.

    Methods may be called from any thread, and return at once; `step`, `make_room` and `close` are
    the engine's thread's.

    Args:
        encoder: makes contexts.
        settings: how much is kept.
        folder: where contexts survive a restart; None for memory only.
        identity: digest of the engine (`identity_digest`); a folder brings its own.
        wake: called when there is something for `step` to do; from any thread.
        changed: called with the id of a context whose status or progress has changed.
        clock: returns seconds since 1970.
        writer: runs the writing of files; None for a thread of its own.

    Attributes:
        talks: what answers keep for prompts that go on with them.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: StoreSettings,
        *,
        folder: StoreFolder | None = None,
        identity: bytes = b"",
        wake: Callable[[], None] = lambda: None,
        changed: Callable[[str], None] = lambda id: None,
        clock: Callable[[], float] = time.time,
        writer: Executor | None = None,
    ) -> None:
        keys = KeyMaker(secrets.token_bytes(_SECRET_BYTES), identity)
        self._table = Table(
            encoder,
            settings,
            keys=keys if folder is None else folder.keys,
            folder=folder,
            clock=clock,
            changed=changed,
            wake=wake,
        )
        self.talks: Talks = self._table.talks
        self._finder = Finder(self._table)
        self._shelf = Shelf(self._table, writer)
        self._keeper = Keeper(self._table, self._shelf)
        self._shelf.rescan()

    # -------------------------------------------------------------------------- for requests

    def acquire(self, wanted: Wanted) -> Lease:
        """Return a hold on a context, which is encoded unless it is there or under way.

        Raises:
            RefusalError: it can never fit.
        """
        with self._table.lock:
            entry, outcome, reason = self._finder.of_content(wanted)
            lease = self._lease(entry, outcome, reason)
        self._go_on(entry)
        return lease

    def lease(self, tenant: str, id: str) -> Lease:
        """Return a hold on the context of an id.

        Raises:
            RefusalError: there is none, it has expired, or it cannot be encoded.
        """
        with self._table.lock:
            entry = self._finder.usable(tenant, id)
            if entry.status is Status.FAILED:
                raise RefusalError(
                    f"the context {id} could not be encoded: {entry.error}; delete it, and create"
                    " it again",
                    code="context_failed",
                    status=409,
                )
            outcome, reason = self._finder.look(entry)
            lease = self._lease(entry, outcome, reason)
        self._go_on(entry)
        return lease

    def create(
        self, wanted: Wanted, *, name: str | None = None, pin: bool = False
    ) -> tuple[ContextView, bool]:
        """Make a context that a client manages by its id, or return the one of equal content.

        Returns:
            The context, and True if it is new.

        Raises:
            RefusalError: it can never fit, or cannot be pinned.
        """
        _check_name(name)
        with self._table.lock:
            entry, outcome, reason = self._finder.of_content(wanted)
            is_new = outcome is Outcome.MISS and reason not in ("evicted", "failed")
            if pin:
                try:
                    self._finder.pin(entry)
                except RefusalError:
                    if is_new and not entry.users:
                        self._table.forget(entry)
                    raise
            entry.listed, entry.write_after = True, 0.0
            if name is not None:
                entry.name = name
            if wanted.ttl is not None:
                entry.ttl = wanted.ttl
            entry.touch(self._table.clock())
            self._table.counts.count(outcome, reason)
            view = entry.view()
        self._shelf.note_change(entry)
        self._go_on()
        return view, is_new

    def get(self, tenant: str, id: str) -> ContextView:
        """Return a tenant's context.

        Raises:
            RefusalError: there is none of this id.
        """
        with self._table.lock:
            return self._finder.of_id(tenant, id).view()

    def list(self, tenant: str) -> list[ContextView]:
        """Return a tenant's contexts, the newest first; those of single requests are not listed."""
        with self._table.lock:
            self._finder.drop_expired()
            return [e.view() for e in self._table.registry.of_tenant(tenant) if e.keep]

    def content(self, tenant: str, id: str) -> Content:
        """Return what a context is made of.

        Raises:
            RefusalError: there is none, or it has expired.
        """
        with self._table.lock:
            content = self._finder.usable(tenant, id).content
            assert content is not None, "it has not expired"
            return content

    def of_text(self, scope: Scope, text: Content) -> Content | None:
        """Return what is known of a text; None for nothing.

        Of a long document this is much faster than its tokens.

        Args:
            scope: whose contexts may tell.
            text: a content without token ids.
        """
        with self._table.lock:
            return self._table.registry.of_text(scope, text)

    def shared_text(self, scope: Scope, text: Content) -> int:
        """Return how many characters a text begins alike with some kept context.

        Args:
            scope: whose contexts count.
            text: a content without token ids.
        """
        with self._table.lock:
            return self._table.registry.shared_text(scope, text)

    def prefix_of(self, scope: Scope, content: Content) -> Content | None:
        """Return the longest kept context that `content` begins with; None if there is none."""
        with self._table.lock:
            self._finder.drop_expired()
            entry = self._table.registry.prefix_of(scope, content)
            return None if entry is None else entry.content

    def update(
        self,
        tenant: str,
        id: str,
        *,
        ttl: float | None = UNCHANGED,
        pin: bool = UNCHANGED,
        name: str | None = UNCHANGED,
    ) -> ContextView:
        """Change how long a context is kept, or its name.

        Raises:
            RefusalError: there is none, it has expired, or it cannot be pinned.
        """
        with self._table.lock:
            entry = self._finder.usable(tenant, id)
            if name is not UNCHANGED:
                _check_name(name)
                entry.name = name
            if pin is not UNCHANGED and pin:
                self._finder.pin(entry)
            elif pin is not UNCHANGED:
                entry.pinned = False
            if ttl is not UNCHANGED:
                entry.ttl = ttl
            entry.listed, entry.write_after = True, 0.0
            entry.touch(self._table.clock())
            view = entry.view()
        self._shelf.note_change(entry)
        self._go_on()
        return view

    def delete(self, tenant: str, id: str) -> None:
        """Delete a context: at once for those who look, after its last user for its memory.

        An encode is canceled, and whoever waits for it is refused.

        Raises:
            RefusalError: there is none of this id.
        """
        with self._table.lock:
            entry = self._finder.of_id(tenant, id)
            entry.deleted = True
            self._table.forget_talks(entry)
            refusal = RefusalError(
                f"the context {id} was deleted; create it again",
                code="context_deleted",
                status=409,
            )
            self._table.resolve(entry, refusal)
            # Now, so that it does not come back after a sudden end. What is being written goes when
            # that has ended.
            self._table.remove_files(entry)
            entry.has_file = False
        self._go_on()

    def counts(self) -> tuple[Counts, dict[str, tuple[int, int]], Counter[str]]:
        """Return counters; contexts and bytes by location; and contexts that wait, by tenant."""
        with self._table.lock:
            places = {place.value: (0, 0) for place in Location}
            for entry in self._table.registry:
                if entry.location is not None:
                    number, nbytes = places[entry.location]
                    places[entry.location] = (number + 1, nbytes + entry.nbytes)
            queued = Counter(entry.scope.tenant for entry in self._table.queue)
            return copy.deepcopy(self._table.counts), places, queued

    # ------------------------------------------------------------------ for the engine's thread

    def step(self) -> bool:
        """Do a piece of what there is to do: drop, read, begin and finish encodes, write.

        To be called after every step of the engine, after `wake`, and every second or so.

        Returns:
            True if there is more to do at once.
        """
        return self._keeper.step()

    def make_room(self) -> bool:
        """Drop from the device what nobody uses, after memory ran out; False if nothing was."""
        return self._keeper.make_room()

    def close(self) -> None:
        """Refuse whoever waits, and write what is worth it."""
        self._keeper.close()

    # ----------------------------------------------------------------------------------- inside

    def _go_on(self, *entries: Entry) -> None:
        self._table.deliver()
        self._table.wake(*entries)

    def _lease(self, entry: Entry, outcome: Outcome, reason: str) -> Lease:
        table = self._table

        def view() -> ContextView:
            with table.lock:
                return entry.view()

        def release(lease: Lease) -> None:
            with table.lock:
                entry.users -= 1
                entry.touch(table.clock())
                futures = table.waiting.get(entry, [])
                if lease.ready in futures:
                    futures.remove(lease.ready)
                if not entry.users and entry.is_pending:
                    entry.linger_until = table.clock() + table.settings.linger_s
            lease.ready.cancel()
            self._go_on(entry)

        lease = Lease(entry.id, outcome, reason, view=view, release=release)
        entry.users += 1
        entry.linger_until = None
        entry.touch(table.clock())
        entry.hits += outcome is not Outcome.MISS
        table.counts.count(outcome, reason)
        table.waiting.setdefault(entry, []).append(lease.ready)
        if entry.context is not None:
            table.resolve(entry)
        return lease


def _check_name(name: str | None) -> None:
    if name is not None and len(name) > _LONGEST_NAME:
        raise RefusalError(
            f"the name {quote(name)} is too long; give at most {_LONGEST_NAME} characters",
            code="invalid_value",
        )
