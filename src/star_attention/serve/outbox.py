"""What one connection sends: the head of an answer leaves with what follows it."""

from __future__ import annotations

import asyncio
from typing import Any

_HEAD = b"HTTP/1.1 "


class Outbox:
    """A transport that sends the head of an answer with its first bytes, in one write.

    Each write is a call of the system, which gives Python to the engine's thread. Nothing else
    waits: with many streams the engine would wait for all of their pieces.

    Args:
        transport: what sends; all but writing is left to it.
        loop: its event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes; a head with the next ones, or by itself if none follow at once."""
        if not self._head and data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self._send_head)
            return
        head, self._head = self._head, b""
        if not self._transport.is_closing():
            self._transport.write(head + data)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that have not been sent."""
        return len(self._head) + self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Close the connection after what was written."""
        self._send_head()
        self._transport.close()

    def _send_head(self) -> None:
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)
