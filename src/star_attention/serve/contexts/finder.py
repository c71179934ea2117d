"""Finds the context that a request needs, or makes an entry for it. Callers hold the lock."""

from __future__ import annotations

from star_attention.serve.contexts import budget
from star_attention.serve.contexts.entry import Entry, Location, Status, Wanted
from star_attention.serve.contexts.keys import new_id
from star_attention.serve.contexts.lease import Outcome
from star_attention.serve.contexts.table import Table
from star_attention.serve.refusals import RefusalError


class Finder:
    """Looks up contexts of a table, and queues those that have to be encoded or read."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def of_id(self, tenant: str, id: str) -> Entry:
        """Return a tenant's context, which may have expired.

        Raises:
            RefusalError: it has none of this id.
        """
        entry = self._table.registry.get(tenant, id)
        if entry.is_expired(self._table.clock()):
            self._table.expire(entry)
            entry = self._table.registry.get(tenant, id)
        return entry

    def usable(self, tenant: str, id: str) -> Entry:
        """Return a tenant's context that has not expired.

        Raises:
            RefusalError: there is none.
        """
        entry = self.of_id(tenant, id)
        if entry.status is Status.EXPIRED:
            raise RefusalError(
                f"the context {id} has expired, {entry.ttl:,.0f} seconds after its last use; create"
                " it again, or with a longer ttl",
                code="context_expired",
                status=404,
            )
        return entry

    def drop_expired(self) -> None:
        """Drop what nobody has used for too long."""
        now = self._table.clock()
        for entry in self._table.registry:
            if entry.is_expired(now):
                self._table.expire(entry)

    def of_content(self, wanted: Wanted) -> tuple[Entry, Outcome, str]:
        """Return the context that is wanted, made if need be, and how and why it was found.

        Raises:
            RefusalError: it can never fit.
        """
        table, ids = self._table, wanted.content.ids
        key = table.keys.key(wanted.scope, ids)
        entry, gone = table.registry.find(key, wanted.scope, ids), ""
        if entry is not None and entry.is_expired(table.clock()):
            table.expire(entry)
            entry, gone = None, "expired"
        if entry is None:
            reason = gone or self._why_new(wanted)
            return self._new(wanted, key), Outcome.MISS, reason
        outcome, reason = self.look(entry)
        entry.keep = entry.keep or wanted.keep
        if wanted.ttl is not None:
            entry.marked, entry.ttl = True, _longer(entry.ttl, wanted.ttl)
        return entry, outcome, reason

    def look(self, entry: Entry) -> tuple[Outcome, str]:
        """Return how a known context is found, and see to it that it gets to the device."""
        if entry.is_pending:
            return Outcome.JOINED, ""
        if entry.status is Status.FAILED:
            self.again(entry)
            return Outcome.MISS, "failed"
        if entry.location is Location.COLD:
            self.again(entry)
            # It is asked for too rarely to stay, and often enough to be worth a file.
            entry.marked = True
            self._table.counts.again += 1
            return Outcome.MISS, "evicted"
        self.fetch(entry)
        return Outcome.HIT, ""

    def fetch(self, entry: Entry) -> None:
        """Have a context brought back that is in host memory or on disk."""
        is_on_its_way = entry.loading or entry in self._table.queue
        is_elsewhere = entry.location in (Location.HOST, Location.DISK)
        if is_elsewhere and not is_on_its_way:
            self._table.queue.append(entry)

    def again(self, entry: Entry) -> None:
        """Have a context encoded again.

        Raises:
            RefusalError: it can never fit.
        """
        self._check_size(entry.tokens, entry.nbytes, besides=entry)
        entry.was_ready = entry.status is Status.READY
        entry.status, entry.done, entry.error = Status.QUEUED, 0, None
        entry.retried = False
        self._table.queue.append(entry)
        self._table.note(entry)

    def pin(self, entry: Entry) -> None:
        """Keep a context on the device for good.

        Raises:
            RefusalError: too much is pinned.
        """
        if entry.pinned:
            return
        table = self._table
        free = table.settings.pin_limit - budget.pinned(table.registry)
        if entry.nbytes > free:
            raise RefusalError(
                f"pinning this context takes {entry.nbytes:,} bytes, and {free:,} of"
                f" {table.settings.pin_limit:,} are left for pinned contexts; unpin another one, or"
                " give this one a ttl",
                code="pin_budget",
            )
        entry.pinned = True
        if entry.location is Location.COLD:
            self.again(entry)
        else:
            self.fetch(entry)

    def _new(self, wanted: Wanted, key: bytes) -> Entry:
        table, now = self._table, self._table.clock()
        tokens = len(wanted.content)
        nbytes = table.encoder.nbytes(tokens)
        self._check_size(tokens, nbytes)
        entry = Entry(
            id=new_id(),
            key=key,
            scope=wanted.scope,
            content=wanted.content,
            tokens=tokens,
            nbytes=nbytes,
            created_at=now,
            last_used_at=now,
            keep=wanted.keep,
            ttl=_longer(table.settings.ttl, wanted.ttl),
            marked=wanted.ttl is not None,
        )
        table.registry.add(entry)
        table.queue.append(entry)
        table.note(entry)
        return entry

    def _check_size(self, tokens: int, nbytes: int, besides: Entry | None = None) -> None:
        others = [entry for entry in self._table.registry if entry is not besides]
        room = self._table.settings.device_bytes - budget.pinned(others)
        if nbytes > room:
            raise RefusalError(
                f"a context of {tokens:,} tokens takes {nbytes:,} bytes, and this server has"
                f" {room:,} for contexts that are not pinned; cut the document, or unpin another",
                code="context_too_large",
            )

    def _why_new(self, wanted: Wanted) -> str:
        table, ids = self._table, wanted.content.ids
        block_size = table.encoder.block_size(len(ids))
        near, _ = table.registry.nearest(wanted.scope, ids, block_size)
        if near is not None:
            return "input_changed"
        return "beginning_changed" if table.registry.ends_alike(wanted.scope, ids) else "new"


def _longer(ttl: float | None, least: float | None) -> float | None:
    """Return a time to live that is no shorter than wanted; None for no end."""
    return ttl if ttl is None or least is None else max(ttl, least)
