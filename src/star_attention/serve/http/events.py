"""Bodies of responses: JSON, and events that end when their client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response

_T = TypeVar("_T")
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_AS_IT_IS = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_ESCAPED = json.JSONEncoder(separators=(",", ":"))

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Or nginx collects the whole answer before it passes it on.
    "x-accel-buffering": "no",
}


def event(value: dict[str, Any]) -> bytes:
    """Return an event with a JSON object."""
    return b"data: " + encoded(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """Return an event with a JSON object, whose name is the object's type."""
    return f"event: {value['type']}\n".encode() + event(value)


def comment(text: str) -> bytes:
    """Return a line that clients skip."""
    return f": {text}\n\n".encode()


def encoded(value: Any) -> bytes:
    """Return JSON in UTF-8; half characters are escaped."""
    try:
        return _AS_IT_IS.encode(value).encode()
    except UnicodeEncodeError:
        return _ESCAPED.encode(value).encode()


class ObjectResponse(JSONResponse):
    """A response that is JSON, whatever characters clients have sent."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of the body."""
        return encoded(content)


class ClientLeftError(Exception):
    """The client closed its connection before it had its answer."""


async def disconnected(receive: _Receive) -> None:
    """Return once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: _Receive, work: Awaitable[_T]) -> _T:
    """Return what `work` returns; cancel it if the client leaves before.

    Servers cancel nothing by themselves where no answer has begun.

    Raises:
        ClientLeftError: the client has left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for each in (task, watcher):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


class EventStream(Response):
    """A response of events. Their source is closed when it ends and when the client leaves.

    Args:
        source: the events, as bytes.
        headers: further headers.
        on_end: called at its end, however it comes.
    """

    def __init__(
        self, source: AsyncIterator[bytes], headers: dict[str, str], on_end: Callable[[], None]
    ) -> None:
        self._source, self._on_end, self._has_begun = source, on_end, False
        super().__init__(None, headers={**_HEADERS, **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(OSError):
                await unless_left(receive, self._write(send))
        except ClientLeftError:
            # An answer that has not begun is logged as one that nobody reads.
            if not self._has_begun:
                raise
        finally:
            self._on_end()

    async def _write(self, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async for block in self._source:
                if not self._has_begun:
                    # With the first events, so that both are one write.
                    self._has_begun = True
                    await send(start)
                await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            close = getattr(self._source, "aclose", None)
            if close is not None:
                await close()
