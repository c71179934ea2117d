"""What leaves a store by itself: expired, deleted, left by all who waited, or too much."""

from __future__ import annotations

from star_attention.serve.contexts.entry import Entry, Location, Status
from star_attention.serve.contexts.table import Table


class Sweeper:
    """Drops contexts of a table.

    Attributes:
        swept_at: when all of them were last looked at, by the table's clock.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self.swept_at = table.clock()

    def sweep(self) -> list[Entry]:
        """Drop what has expired, was deleted, was for one request, or is too much.

        Returns:
            The contexts that were looked at: those that have changed.
        """
        table = self._table
        with table.lock:
            now, is_whole = table.clock(), table.all_changed
            changed = table.take_changed()
            for entry in changed:
                if not entry.writing and entry.status is not Status.ENCODING:
                    self._sweep_one(entry, now)
            if is_whole:
                self.swept_at = now
                self._drop_cold()
        return changed

    def _sweep_one(self, entry: Entry, now: float) -> None:
        is_over = not entry.keep or (entry.status is Status.FAILED and not entry.listed)
        if entry.status is Status.QUEUED and is_given_up(entry, now):
            self.give_up(entry)
        elif entry.is_expired(now):
            self._table.expire(entry)
        elif not entry.users and (entry.deleted or (is_over and not entry.is_pending)):
            self._table.forget(entry)

    def _drop_cold(self) -> None:
        cold = [
            entry
            for entry in self._table.registry
            if entry.location is Location.COLD and not entry.users and not entry.writing
        ]
        settings = self._table.settings
        excess = sum(entry.tokens for entry in cold) - settings.cold_tokens
        too_many = len(cold) - settings.cold_contexts
        for entry in sorted(cold, key=lambda entry: (entry.listed, entry.last_used_at)):
            if excess <= 0 and too_many <= 0:
                break
            excess -= entry.tokens
            too_many -= 1
            self._table.forget(entry)

    def give_up(self, entry: Entry) -> None:
        """Leave a context as it was before somebody wanted it encoded."""
        if entry in self._table.queue:
            self._table.queue.remove(entry)
        if entry.was_ready:
            entry.status, entry.done, entry.linger_until = Status.READY, 0, None
        else:
            self._table.forget(entry)


def is_given_up(entry: Entry, now: float) -> bool:
    """True if nobody waits for an encode, nor has for a while."""
    is_left = not entry.users and not entry.listed and not entry.pinned
    return is_left and entry.linger_until is not None and now >= entry.linger_until
