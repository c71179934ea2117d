"""What has to leave the device, or the disk, to make room: by last use, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from star_attention.serve.contexts.entry import Entry, Status


def may_leave(entry: Entry) -> bool:
    """True if a context's keys and values may leave the device."""
    idle = not entry.users and not entry.writing
    return entry.context is not None and idle and not entry.pinned


def to_evict(entries: Iterable[Entry], need: int, limit: int) -> list[Entry] | None:
    """Return the contexts that leave the device, the one used longest ago first.

    Args:
        entries: all contexts.
        need: bytes that are needed.
        limit: most bytes on the device.

    Returns:
        As few as there is room after them; none if there is room already. None if there cannot be
        room now.
    """
    entries = list(entries)
    excess = on_device(entries) + need - limit
    leaving: list[Entry] = []
    for entry in sorted(filter(may_leave, entries), key=lambda entry: entry.last_used_at):
        if excess <= 0:
            break
        leaving.append(entry)
        excess -= entry.nbytes
    return leaving if excess <= 0 else None


def on_device(entries: Iterable[Entry]) -> int:
    """Return the bytes on the device, with those that are on their way there."""
    return sum(
        entry.nbytes
        for entry in entries
        if entry.context is not None or entry.loading or entry.status is Status.ENCODING
    )


def parked(entries: Iterable[Entry]) -> int:
    """Return the bytes in host memory."""
    return sum(entry.parked.nbytes for entry in entries if entry.parked is not None)


def parked_to_drop(entries: Iterable[Entry], need: int, limit: int) -> list[Entry] | None:
    """Return the contexts that leave host memory to make room: copies first, then by last use.

    Args:
        entries: all contexts.
        need: bytes that are needed.
        limit: most bytes in host memory.

    Returns:
        As few as needed; None if there cannot be room.
    """
    there = [entry for entry in entries if entry.parked is not None]
    excess = parked(there) + need - limit
    removable = [entry for entry in there if not entry.writing and not entry.loading]
    leaving: list[Entry] = []
    for entry in sorted(removable, key=lambda entry: (entry.context is None, entry.last_used_at)):
        if excess <= 0:
            break
        if entry.context is None and (entry.users or entry.pinned):
            continue
        leaving.append(entry)
        excess -= entry.parked.nbytes
    return leaving if excess <= 0 else None


def pinned(entries: Iterable[Entry]) -> int:
    """Return the bytes of pinned contexts, wherever they are."""
    return sum(entry.nbytes for entry in entries if entry.pinned)


def files_to_remove(entries: Iterable[Entry], need: int, limit: int) -> list[Entry] | None:
    """Return the contexts whose files make room for another: copies first, then by last use.

    Args:
        entries: all contexts.
        need: bytes that are needed.
        limit: most bytes of files.

    Returns:
        As few as needed; None if there cannot be room, because of pinned contexts and such that are
        in use.
    """
    files = [entry for entry in entries if entry.has_file]
    excess = sum(entry.nbytes for entry in files) + need - limit
    removable = [entry for entry in files if not entry.pinned and not entry.users]
    leaving: list[Entry] = []
    for entry in sorted(
        removable, key=lambda entry: (not _is_in_memory(entry), entry.last_used_at)
    ):
        if excess <= 0:
            break
        leaving.append(entry)
        excess -= entry.nbytes
    return leaving if excess <= 0 else None


def _is_in_memory(entry: Entry) -> bool:
    return entry.context is not None or entry.parked is not None
