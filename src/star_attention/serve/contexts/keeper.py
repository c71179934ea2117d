"""What the engine's thread does for a store: encode, read, evict, write and drop."""

from __future__ import annotations

import logging
from typing import Any

from star_attention.errors import ContextFileError, OutOfMemoryError, first_line
from star_attention.serve.contexts import budget
from star_attention.serve.contexts.entry import Entry, Status
from star_attention.serve.contexts.host import HostTier
from star_attention.serve.contexts.shelf import Shelf
from star_attention.serve.contexts.sweeper import Sweeper, is_given_up
from star_attention.serve.contexts.table import ContextJob, Table
from star_attention.serve.refusals import RefusalError
from star_attention.serve.turns import Turns

_log = logging.getLogger(__name__)

_SWEEP_S = 0.5
"""Seconds after which all contexts are looked at, if nothing happened meanwhile."""


class Keeper:
    """Advances the contexts of a table, a piece at a time.

    Nothing that takes long happens while the lock is held: a context is marked, worked on, and
    looked at again afterwards.

    Args:
        table: the contexts.
        shelf: their files.
    """

    def __init__(self, table: Table, shelf: Shelf) -> None:
        self._table, self._shelf = table, shelf
        self._job: tuple[Entry, ContextJob, Entry | None] | None = None
        self._sweeper, self._turns = Sweeper(table), Turns()
        self._host = HostTier(table, shelf)

    def step(self) -> bool:
        """Do a piece of what there is to do; return True if there is more to do at once."""
        table, has_begun = self._table, False
        if not 0 <= table.clock() - self._sweeper.swept_at < _SWEEP_S:
            table.all_changed = True
        if table.has_changed:
            self._shelf.write_ahead(self._sweeper.sweep())
            self._make_talks_fit()
        self._host.step()
        if self._job is not None and self._job[0].loading:
            self._poll_load(*self._job[:2])
        elif self._job is not None:
            self._poll(*self._job)
        if self._job is None and table.queue:
            has_begun = self._begin_next()
        table.deliver()
        is_busy = self._job is not None or self._host.is_moving
        return is_busy or has_begun or table.has_changed

    def make_room(self) -> bool:
        """Drop from the device what nobody uses; return False if there was nothing."""
        with self._table.lock:
            leaving = [entry for entry in self._table.registry if budget.may_leave(entry)]
            self._table.counts.out_of_memory += 1
        for entry in leaving:
            self._host.take(entry)
            self._evict(entry)
        has_dropped = self._table.talks.make_room(0)
        self._table.encoder.free_memory()
        return bool(leaving) or has_dropped

    def close(self) -> None:
        """Refuse whoever waits, and write what is worth it."""
        table = self._table
        self._host.close()
        if self._job is not None:
            entry, job, base = self._job
            job.cancel()
            if entry.loading:
                self._end_load(entry)
            else:
                with table.lock:
                    self._end_job(base)
                    entry.status = Status.QUEUED
        refusal = RefusalError(
            "this server is ending; ask again later", code="shutting_down", status=503
        )
        with table.lock:
            for entry in list(table.waiting):
                table.resolve(entry, refusal)
            table.queue.clear()
        self._shelf.close()
        table.deliver()

    def _poll(self, entry: Entry, job: ContextJob, base: Entry | None) -> None:
        """See how far the encode under way is."""
        table = self._table
        with table.lock:
            now = table.clock()
            waits = len(table.queue) > 0
            given_up = is_given_up(entry, now) and (waits or 2 * entry.done < entry.tokens)
            if entry.deleted or given_up:
                self._end_job(base)
                table.counts.encodes["canceled"] += 1
                entry.status = Status.FAILED if entry.deleted else Status.QUEUED
                if not entry.deleted:
                    self._sweeper.give_up(entry)
            elif not job.done:
                if job.tokens != entry.done:
                    entry.done = job.tokens
                    table.note(entry)
                return
        if self._job is None:
            job.cancel()
            return
        try:
            context = job.result()
        except Exception as error:
            with table.lock:
                self._end_job(base)
            self._failed(entry, error)
            return
        with table.lock:
            self._end_job(base)
            table.counts.encodes["done"] += 1
            table.counts.encoded_tokens += entry.tokens
            table.counts.reused_tokens += getattr(context, "reused_tokens", 0)
            self._arrived(entry, context)

    def _end_job(self, base: Entry | None) -> None:
        self._job = None
        if base is not None:
            base.users -= 1

    def _arrived(self, entry: Entry, context: Any) -> None:
        entry.context, entry.nbytes = context, context.nbytes
        entry.status, entry.done, entry.linger_until = Status.READY, entry.tokens, None
        entry.retried = False
        entry.touch(self._table.clock())
        self._table.resolve(entry)
        self._table.changed[entry] = None

    def _failed(self, entry: Entry, error: Exception) -> None:
        """Try once more after memory ran out; otherwise tell whoever waits."""
        table = self._table
        if isinstance(error, OutOfMemoryError) and not entry.retried:
            entry.retried = True
            self.make_room()
            with table.lock:
                entry.status = Status.QUEUED
                table.queue.insert(0, entry)
            return
        _log.warning("%s was not encoded: %s", entry.id, first_line(error))
        with table.lock:
            table.counts.encodes["failed"] += 1
            entry.status, entry.error, entry.linger_until = Status.FAILED, error, None
            if entry in table.queue:
                table.queue.remove(entry)
            table.resolve(entry, error)

    def _begin_next(self) -> bool:
        """Bring the first context of the queue to the device, as soon as there is room.

        Returns:
            True if it was begun.
        """
        while (entry := self._next()) is not None:
            with self._table.lock:
                leaving = self._leaving_for(entry)
            if leaving is None:
                return False
            if leaving:
                if not self._all_leave(leaving):
                    return True
                # Somebody may have come for one of them.
                continue
            self._turns.note(entry.scope.tenant)
            if entry.status is Status.QUEUED:
                self._start(entry)
            else:
                self._load(entry)
            # One at a time: others decode between them.
            return True
        return False

    def _next(self) -> Entry | None:
        """Return the context of the queue whose turn it is, of those that somebody still wants."""
        table = self._table
        with table.lock:
            table.queue[:] = [entry for entry in table.queue if _is_wanted(entry)]
            # Those that nobody waits for any more come last.
            due = [entry for entry in table.queue if entry.linger_until is None] or table.queue
            if not due:
                return None
            tenant = self._turns.first(entry.scope.tenant for entry in due)
            return next(entry for entry in due if entry.scope.tenant == tenant)

    def _leaving_for(self, entry: Entry) -> list[Entry] | None:
        """Return what makes room for a context; None if it has to wait, or can never fit."""
        table = self._table
        others = [other for other in table.registry if other is not entry]
        limit = table.settings.device_bytes
        if entry.nbytes > limit - budget.pinned(others):
            table.queue.remove(entry)
            refusal = RefusalError(
                f"a context of {entry.tokens:,} tokens takes {entry.nbytes:,} bytes, and"
                f" {limit - budget.pinned(others):,} are not pinned; unpin another one",
                code="context_too_large",
            )
            if entry.status is Status.QUEUED:
                entry.status, entry.error = Status.FAILED, refusal
            table.resolve(entry, refusal)
            return None
        talks = table.talks
        leaving = budget.to_evict(others, entry.nbytes, limit - talks.nbytes)
        if leaving is None:
            # It needs all of the room.
            leaving = budget.to_evict(others, entry.nbytes, limit)
            if leaving is not None:
                talks.make_room(0)
        return leaving

    def _make_talks_fit(self) -> None:
        """Have contexts leave that conversations have taken the room of; drop old ones."""
        table = self._table
        table.talks.drop_old()
        if not table.talks.nbytes:
            return
        with table.lock:
            limit = table.settings.device_bytes
            leaving = budget.to_evict(table.registry, table.talks.nbytes, limit)
            if leaving is None:
                # What is in use, or pinned, comes first.
                table.talks.make_room(max(0, limit - budget.on_device(table.registry)))
        self._all_leave(leaving or [])

    def _all_leave(self, leaving: list[Entry]) -> bool:
        """Take contexts off the device; False while one is on its way to host memory."""
        for entry in leaving:
            if self._host.is_moving or self._host.begin(entry):
                return False
            self._evict(entry)
        return True

    def _start(self, entry: Entry) -> None:
        table = self._table
        with table.lock:
            table.queue.remove(entry)
            content = entry.content
            assert content is not None, "an expired context is not queued"
            entry.status, entry.done = Status.ENCODING, 0
            block_size = table.encoder.block_size(entry.tokens)
            base, _ = table.registry.nearest(entry.scope, content.ids, block_size)
            if base is not None:
                base.users += 1
            table.note(entry)
        try:
            job = table.encoder.start(content.ids, None if base is None else base.context)
        except Exception as error:
            with table.lock:
                self._end_job(base)
            self._failed(entry, error)
            return
        self._job = (entry, job, base)

    def _load(self, entry: Entry) -> None:
        """Begin to bring a context back from host memory or disk."""
        table = self._table
        with table.lock:
            table.queue.remove(entry)
            entry.loading = True
            entry.users += 1
        try:
            self._job = (entry, _coming(table, entry), None)
        except Exception as error:
            self._end_load(entry)
            self._not_loaded(entry, error)

    def _poll_load(self, entry: Entry, job: ContextJob) -> None:
        """Read a piece of a context; encode it again if it cannot be read."""
        if not entry.deleted and not job.done:
            job.advance()
        if not entry.deleted and not job.done:
            return
        self._end_load(entry)
        if entry.deleted:
            job.cancel()
            return
        try:
            context = job.result()
        except Exception as error:
            self._not_loaded(entry, error)
            return
        with self._table.lock:
            counts = self._table.counts
            if entry.parked is None:
                counts.reloads += 1
            else:
                counts.returns += 1
            self._arrived(entry, context)

    def _end_load(self, entry: Entry) -> None:
        self._job = None
        with self._table.lock:
            entry.loading = False
            entry.users -= 1
            self._table.changed[entry] = None

    def _not_loaded(self, entry: Entry, error: Exception) -> None:
        table = self._table
        if isinstance(error, OutOfMemoryError):
            if entry.retried:
                entry.retried = False
                with table.lock:
                    table.resolve(entry, error)
                return
            entry.retried = True
            self.make_room()
            with table.lock:
                table.queue.insert(0, entry)
            return
        _log.warning("%s cannot be read and is encoded again: %s", entry.id, first_line(error))
        with table.lock:
            if table.folder is not None and isinstance(error, (ContextFileError, OSError)):
                table.folder.set_aside(entry)
            entry.has_file, entry.parked, entry.was_ready = False, None, True
            entry.status, entry.done = Status.QUEUED, 0
            table.queue.insert(0, entry)

    def _evict(self, entry: Entry) -> None:
        """Take a context off the device, after writing it if that is worth it."""
        table = self._table
        with table.lock:
            if not budget.may_leave(entry):
                return
            entry.writing = True
        if entry.parked is None:
            self._shelf.before_leaving(entry)
        with table.lock:
            entry.writing = False
            if entry.users or entry.pinned:
                return
            entry.context = None
            is_gone = entry.deleted or not entry.keep
            kept_in = "host" if entry.parked is not None else "disk" if entry.has_file else "cold"
            place = "gone" if is_gone else kept_in
            table.counts.evicted[place] += 1
            table.all_changed = True
            if is_gone:
                table.forget(entry)
            table.note(entry)


def _coming(table: Table, entry: Entry) -> ContextJob:
    """Return what brings a context back, from where that is quickest."""
    if entry.parked is not None:
        return table.encoder.bring_back(entry.parked)
    assert table.folder is not None and entry.content is not None, "it is on disk"
    return table.encoder.load(table.folder.path_of(entry), entry.content.ids)


def _is_wanted(entry: Entry) -> bool:
    """True if a context of the queue is still to be brought to the device."""
    is_there = entry.context is not None or entry.status is Status.FAILED
    is_wanted = bool(entry.users or entry.pinned or entry.status is Status.QUEUED)
    return is_wanted and not entry.deleted and not is_there
