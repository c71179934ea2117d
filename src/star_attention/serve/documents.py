"""Documents of clients, read as text: few at a time, and those of all keys in turn."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter, OrderedDict, defaultdict

from star_attention.files.apart import Limits, document_text_apart
from star_attention.files.documents import document_kind
from star_attention.files.text import decode

_CORES_EACH = 4
_LEAST_AT_ONCE = 2


class Documents:
    """Reads what clients send as files.

    Plain text is decoded in a thread. Documents are read by processes of their own, one for a key
    at a time, so that the next one is another key's. The latest texts of documents are kept:
    clients send a document with every question on it.

    Args:
        most_bytes: most bytes of a document's text, and most characters of the texts that are kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.limits = Limits(text_bytes=most_bytes)
        self._kept: OrderedDict[tuple[str, bytes], str] = OrderedDict()
        self._places = asyncio.Semaphore(max(_LEAST_AT_ONCE, (os.cpu_count() or 1) // _CORES_EACH))
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: Counter[str] = Counter()

    async def text_of(self, data: bytes, name: str, tenant: str) -> str:
        """Return the text of a file's bytes; documents need the extra `documents`.

        Args:
            data: the file.
            name: its name, for messages; it is never opened.
            tenant: whose it is.

        Raises:
            TextError: it is no text, or takes too much to read.
            MissingPackageError: it is a document, and the extra is not installed.
        """
        if document_kind(data) is None:
            return await asyncio.to_thread(decode, data, name)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
        self._waiting[tenant] += 1
        try:
            async with self._turns[tenant]:
                if (text := self._kept.get((tenant, digest))) is None:
                    async with self._places:
                        text = await document_text_apart(data, name, self.limits)
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant], self._turns[tenant]
        self._keep((tenant, digest), text)
        return text

    def _keep(self, key: tuple[str, bytes], text: str) -> None:
        self._kept[key] = text
        self._kept.move_to_end(key)
        while sum(map(len, self._kept.values())) > self.limits.text_bytes:
            self._kept.popitem(last=False)
