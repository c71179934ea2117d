"""A short way for the pieces of a stream: from the event loop to the connection at once."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import h11

_EXTENSION = "star_attention.line"
_OF_CYCLE = ("disconnected", "response_complete", "flow", "conn", "transport")
"""What this reads of uvicorn's state, which another version may not have."""


class Line:
    """Writes pieces of a body that has begun, past what does so for bodies of any kind.

    uvicorn and h11 take several times as long for a piece, and each piece is a token.

    Args:
        cycle: uvicorn's state of a request and its answer. The body is sent in chunks.
    """

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle

    @property
    def is_open(self) -> bool:
        """True while the body has begun, has not ended, and the client reads it."""
        cycle = self._cycle
        return not (
            cycle.disconnected
            or cycle.response_complete
            or cycle.flow.write_paused
            or cycle.conn.our_state is not h11.SEND_BODY
        )

    def write(self, piece: bytes) -> None:
        """Send a piece, which is not empty, while the line is open."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def offer(scope: MutableMapping[str, Any], cycle: Any) -> None:
    """Let an app find the line of a request, if its answer is sent in chunks."""
    if scope["http_version"] == "1.1" and all(hasattr(cycle, name) for name in _OF_CYCLE):
        scope.setdefault("extensions", {})[_EXTENSION] = Line(cycle)


def line_of(scope: MutableMapping[str, Any]) -> Line | None:
    """Return the line of a request; None without one."""
    line: Line | None = scope.get("extensions", {}).get(_EXTENSION)
    return line
