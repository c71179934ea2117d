"""Host memory between device and disk: contexts wait there, and come back without being read."""

from __future__ import annotations

import logging

from star_attention.errors import first_line
from star_attention.serve.contexts import budget
from star_attention.serve.contexts.entry import Entry
from star_attention.serve.contexts.shelf import Shelf
from star_attention.serve.contexts.table import ParkJob, Table

_log = logging.getLogger(__name__)


class HostTier:
    """Moves contexts of a table to host memory, a layer at a time. All of it is for the engine.

    Args:
        table: the contexts.
        shelf: where they go that leave host memory.
    """

    def __init__(self, table: Table, shelf: Shelf) -> None:
        self._table, self._shelf = table, shelf
        self._moving: tuple[Entry, ParkJob] | None = None
        self._moving_bytes = 0

    @property
    def is_moving(self) -> bool:
        """True while a context is on its way."""
        return self._moving is not None

    def begin(self, entry: Entry) -> bool:
        """Begin to copy a context that is to leave the device; False if it does not go here."""
        if self._moving is not None or not self._takes(entry):
            return False
        try:
            job = self._table.encoder.park(entry.context)
        except Exception as error:
            self._failed(entry, error)
            return False
        with self._table.lock:
            entry.writing = True
            self._moving_bytes = self._table.encoder.host_bytes(entry.context)
        self._moving = entry, job
        return True

    def step(self) -> None:
        """Copy a piece of the context that is on its way."""
        if self._moving is None:
            return
        entry, job = self._moving
        try:
            if not entry.deleted and not job.done:
                job.advance()
            if not entry.deleted and not job.done:
                return
            parked = None if entry.deleted else job.result()
        except Exception as error:
            parked = None
            self._failed(entry, error)
        with self._table.lock:
            entry.parked = parked
        self._end(entry, job)

    def take(self, entry: Entry) -> None:
        """Copy a whole context at once, which is about to leave."""
        if self._moving is not None and self._moving[0] is entry:
            while self._moving is not None:
                self.step()
        elif self._takes(entry):
            try:
                job = self._table.encoder.park(entry.context)
                while not job.done:
                    job.advance()
                entry.parked = job.result()
            except Exception as error:
                self._failed(entry, error)

    def close(self) -> None:
        """Stop what is on its way."""
        if self._moving is not None:
            self._end(*self._moving)

    def _takes(self, entry: Entry) -> bool:
        """True for a context that has room here, after others have left."""
        table, limit = self._table, self._table.settings.host_bytes
        is_new = entry.parked is None and entry.context is not None
        if not limit or not is_new or not entry.keep or entry.deleted or entry.unparkable:
            return False
        need = table.encoder.host_bytes(entry.context) + self._moving_bytes
        with table.lock:
            leaving = budget.parked_to_drop(table.registry, need, limit)
        for other in leaving or ():
            self._drop(other)
        with table.lock:
            return budget.parked(table.registry) + need <= limit

    def _drop(self, entry: Entry) -> None:
        """Take a context out of host memory, after writing it if that is worth it."""
        table = self._table
        with table.lock:
            is_copy = entry.context is not None
            entry.writing = True
        if not is_copy:
            self._shelf.before_leaving(entry)
        with table.lock:
            entry.writing = False
            if not is_copy and (entry.users or entry.pinned):
                # Somebody has come for it.
                return
            entry.parked = None
            if not is_copy:
                table.counts.evicted["disk" if entry.has_file else "cold"] += 1
                table.all_changed = True
            table.note(entry)

    def _end(self, entry: Entry, job: ParkJob) -> None:
        self._moving, self._moving_bytes = None, 0
        job.cancel()
        with self._table.lock:
            entry.writing = False
            self._table.changed[entry] = None

    def _failed(self, entry: Entry, error: Exception) -> None:
        entry.unparkable = True
        _log.warning("%s does not go to host memory: %s", entry.id, first_line(error))
