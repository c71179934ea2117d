"""One client's connection: how long it may take to begin a request, and to read an answer."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from star_attention.serve.http.events import encoded
from star_attention.serve.http.line import offer
from star_attention.serve.http.problems import Problem
from star_attention.serve.outbox import Outbox

MOST_HEAD_S = 30.0
"""Seconds in which the head of a request has to come."""
MOST_UNREAD_S = 300.0
"""Seconds in which a client has to read something of what waits for it."""


class Connection(H11Protocol):
    """HTTP/1.1 with an end for clients that hold a connection and do nothing with it.

    uvicorn limits the time between two requests alone. Its other implementation of HTTP has no
    limit on the size of a head either.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _has_begun = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._app, self.app = self.app, self._run_app

    async def _run_app(self, scope: Any, receive: Any, send: Any) -> None:
        # The next request of a connection begins after the end of this one's answer.
        offer(scope, self.cycle)
        await self._app(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        # An outbox does all that uvicorn asks of a transport, without being one by its class.
        super().connection_made(Outbox(transport, self.loop))  # type: ignore[arg-type]
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop(self._head_timer)
        self._stop(self._read_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            # Its head is complete; what its body may take is the app's to limit.
            self._stop(self._head_timer)
            self._head_timer, self._has_begun = None, False
        else:
            self._has_begun = True
            self._wait_for_head()

    def pause_writing(self) -> None:
        """Wait for a client that does not read what is there for it."""
        super().pause_writing()
        self._stop(self._read_timer)
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop(self._read_timer)
        super().resume_writing()

    def _wait_for_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(MOST_HEAD_S, self._head_is_late)

    def _head_is_late(self) -> None:
        """End the connection, with an answer to what has begun."""
        self._head_timer = None
        if self._has_begun and not self.transport.is_closing():
            self.transport.write(_late())
        self.transport.close()

    def _wait_for_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(MOST_UNREAD_S, self._look_at_reader, unread)

    def _look_at_reader(self, unread: int) -> None:
        """End the connection if no byte was read since the last look."""
        if self.transport.get_write_buffer_size() < unread:
            self._wait_for_reader()
        else:
            # Closed, it would wait for the reader.
            self.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def _late() -> bytes:
    problem = Problem(
        408,
        f"the head of the request was not complete after {MOST_HEAD_S:g} seconds, the most that it"
        " may take; send it at once",
        code="head_timeout",
    )
    body = encoded(problem.envelope)
    head = (
        "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
