"""Writes contexts to a store's folder: ahead of time, and when they have to leave the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from star_attention.errors import first_line
from star_attention.serve.contexts import budget
from star_attention.serve.contexts.entry import Entry, Status
from star_attention.serve.contexts.table import Table

_log = logging.getLogger(__name__)

_AGAIN_S = 300.0
"""Seconds after which a context is tried to be written again."""


class Shelf:
    """The files of a table's contexts. Without a folder it does nothing.

    Args:
        table: the contexts.
        writer: runs the writing of files ahead of time; None for a thread of its own.
    """

    def __init__(self, table: Table, writer: Executor | None) -> None:
        self._table = table
        self._writer = writer
        self._written: tuple[Entry, Future[None]] | None = None
        self._changed: set[Entry] = set()

    def rescan(self) -> None:
        """Take over what is in the folder."""
        table = self._table
        if table.folder is None:
            return
        for entry in table.folder.rescan():
            total = budget.pinned(table.registry) + entry.nbytes
            if entry.pinned and total > table.settings.pin_limit:
                _log.warning("%s is no longer pinned: less may be pinned than before", entry.id)
                entry.pinned = False
            table.registry.add(entry)
        self._make_room(0)

    def note_change(self, entry: Entry) -> None:
        """Remember to write what a client has changed of a context."""
        if self._table.folder is None:
            # Nothing would be written, and so nothing forgotten.
            return
        with self._table.lock:
            self._changed.add(entry)

    def write_ahead(self, entries: Iterable[Entry]) -> None:
        """Write one of these contexts, if that is worth it, before it has to leave."""
        table = self._table
        if table.folder is None:
            return
        if self._written is not None:
            if not self._written[1].done():
                return
            self._finish()
        with table.lock:
            for entry in self._changed:
                if entry.has_file and not entry.deleted:
                    self._write_record(entry)
            self._changed.clear()
            entry_to_write = next(filter(self._should_write, entries), None)
            if entry_to_write is None:
                return
            entry_to_write.writing = True
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        future = self._writer.submit(self._save, entry_to_write)
        self._written = (entry_to_write, future)
        future.add_done_callback(lambda _: table.wake())

    def before_leaving(self, entry: Entry) -> None:
        """Write a context that is about to leave memory, if that is worth it."""
        if self._should_write(entry):
            self._save(entry)

    def close(self) -> None:
        """Write what is worth it, and how often everything was used."""
        table = self._table
        if self._written is not None:
            self._finish()
        if isinstance(self._writer, ThreadPoolExecutor):
            self._writer.shutdown()
        if table.folder is None:
            return
        with table.lock:
            entries = [e for e in table.registry if e.status is Status.READY and not e.deleted]
        for entry in entries:
            if math.isfinite(entry.write_after):
                # There is no later time.
                entry.write_after = 0.0
            self.before_leaving(entry)
            if entry.has_file:
                self._write_record(entry)
        table.folder.close()

    def _should_write(self, entry: Entry) -> bool:
        is_there = entry.context is not None or entry.parked is not None
        is_due = self._table.clock() >= entry.write_after
        is_new = is_there and not entry.has_file and is_due
        return self._table.folder is not None and is_new and entry.worth_keeping

    def _save(self, entry: Entry) -> None:
        """Write a context, if there is room for it."""
        table = self._table
        # From host memory, where it is there, too: nothing waits for that.
        context = entry.context if entry.parked is None else entry.parked.on_host()
        assert table.folder is not None
        try:
            if self._make_room(entry.nbytes):
                table.folder.save(entry, context)
                entry.has_file = True
                return
            reason = f"{entry.nbytes:,} bytes do not fit beside what is pinned or in use"
        except Exception as error:
            reason = first_line(error)
        with table.lock:
            is_first = not entry.write_after
            table.counts.unwritten += is_first
            entry.write_after = table.clock() + _AGAIN_S
        _log.log(
            logging.WARNING if is_first else logging.DEBUG,
            "%s is not kept on disk: %s",
            entry.id,
            reason,
        )

    def _make_room(self, need: int) -> bool:
        """Remove the files used longest ago; return False if that cannot make room."""
        table = self._table
        assert table.folder is not None
        with table.lock:
            leaving = budget.files_to_remove(table.registry, need, table.settings.disk_bytes)
            for entry in leaving or ():
                table.folder.remove_keys(entry)
                entry.has_file = False
                # Its copy on the device would only take the room again.
                entry.write_after = math.inf
                table.note(entry)
        return leaving is not None

    def _finish(self) -> None:
        assert self._written is not None
        entry, future = self._written
        future.result()
        self._written = None
        with self._table.lock:
            entry.writing = False

    def _write_record(self, entry: Entry) -> None:
        folder = self._table.folder
        assert folder is not None
        try:
            folder.write_record(entry)
        except OSError as error:
            _log.warning(
                "changes of %s could not be saved to disk: %s", entry.id, first_line(error)
            )
