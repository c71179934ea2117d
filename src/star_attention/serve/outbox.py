"""What one connection sends: all that is written in a turn of the event loop, at once."""

from __future__ import annotations

import asyncio
from typing import Any


class Outbox:
    """A transport whose writes wait for the end of the event loop's turn, and leave as one.

    The head of an answer, its first piece and its end are writes of their own, and each that is
    sent by itself is a call of the system, which gives Python to the engine's thread.

    Args:
        transport: what sends; all but writing is left to it.
        loop: its event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._blocks: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Have bytes sent soon."""
        if not self._blocks:
            self._loop.call_soon(self._send)
        self._blocks.append(data)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that have not been sent."""
        return sum(map(len, self._blocks)) + self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Close the connection after what was written."""
        self._send()
        self._transport.close()

    def _send(self) -> None:
        blocks, self._blocks = self._blocks, []
        if blocks and not self._transport.is_closing():
            self._transport.write(b"".join(blocks))
