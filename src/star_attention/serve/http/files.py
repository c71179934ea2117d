"""Files that clients upload: texts, kept in memory until they expire."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.serve.http.objects import new_id
from star_attention.serve.refusals import RefusalError

_HELD_BESIDES = 1024
"""Bytes that a file takes beside its text."""


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """An uploaded text.

    Attributes:
        id: its id.
        tenant: whose it is.
        name: its name, as the client gave it; never opened.
        purpose: what the client says it is for.
        text: its text.
        nbytes: bytes as uploaded.
        created_at, expires_at: seconds since 1970; None for never.
    """

    id: str
    tenant: str
    name: str
    purpose: str
    text: str
    nbytes: int
    created_at: float
    expires_at: float | None

    @property
    def held(self) -> int:
        """Bytes that count for the budget: the text of a packed document has more than the file."""
        return max(self.nbytes, len(self.text)) + _HELD_BESIDES

    def as_dict(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.nbytes,
            "created_at": int(self.created_at),
            "expires_at": None if self.expires_at is None else int(self.expires_at),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Files:
    """The uploaded texts of all tenants, within a budget; expired ones are dropped first.

    Args:
        most_bytes: most bytes in all.
        clock: the time.
        is_shared: tells whether there are several tenants, of which each may have half.
    """

    def __init__(
        self,
        most_bytes: int,
        clock: Callable[[], float] = time.time,
        is_shared: Callable[[], bool] = lambda: False,
    ) -> None:
        self._most_bytes, self._clock, self._is_shared = most_bytes, clock, is_shared
        self._files: dict[str, TextFile] = {}
        self._lock = threading.Lock()

    def add(
        self, tenant: str, name: str, text: str, *, nbytes: int, purpose: str, ttl: float | None
    ) -> TextFile:
        """Keep a text.

        Raises:
            RefusalError: there is no room.
        """
        now = self._clock()
        file = TextFile(
            id=new_id("file-"),
            tenant=tenant,
            name=name,
            purpose=purpose,
            text=text,
            nbytes=nbytes,
            created_at=now,
            expires_at=None if ttl is None else now + ttl,
        )
        with self._lock:
            self._drop_expired(now)
            others = list(self._files.values())
            self._check_room(file, others, self._most_bytes, "files")
            if self._is_shared():
                own = [other for other in others if other.tenant == tenant]
                self._check_room(file, own, self._most_bytes // 2, "files with your key")
            self._files[file.id] = file
        return file

    def get(self, tenant: str, id: str) -> TextFile:
        """Return a tenant's file.

        Raises:
            RefusalError: it has none of this id.
        """
        with self._lock:
            self._drop_expired(self._clock())
            file = self._files.get(id)
        if file is None or file.tenant != tenant:
            raise RefusalError(
                f"there is no file {id[:80]}; upload it with POST /v1/files",
                code="file_not_found",
                status=404,
            )
        return file

    def of_tenant(self, tenant: str) -> list[TextFile]:
        """Return a tenant's files, the newest first."""
        with self._lock:
            self._drop_expired(self._clock())
            own = [file for file in self._files.values() if file.tenant == tenant]
        return own[::-1]

    def delete(self, tenant: str, id: str) -> None:
        """Drop a tenant's file; contexts that were made of it stay."""
        self.get(tenant, id)
        with self._lock:
            self._files.pop(id, None)

    def _check_room(self, file: TextFile, others: list[TextFile], most: int, whose: str) -> None:
        held = sum(other.held for other in others)
        if held + file.held > most:
            raise RefusalError(
                f"the file takes {file.held:,} bytes, and {held:,} of {most:,} are in use by"
                f" {whose}; delete some, or let them expire",
                code="files_full",
                status=507,
            )

    def _drop_expired(self, now: float) -> None:
        for file in list(self._files.values()):
            if file.expires_at is not None and now >= file.expires_at:
                del self._files[file.id]
