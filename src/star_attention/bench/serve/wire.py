"""HTTP as a client under load speaks it: answers with the times at which their text came.

asyncio and nothing else, so that thousands of events a second cost the measuring side little.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from star_attention.errors import InvalidInputError, StarAttentionError, quote

_DATA = b"data: "
_MOST_LINE = 2**20


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is.

    Attributes:
        host, port: its address.
        path: what comes before `/v1` in its URLs.
        key: its key; "" for none.
    """

    host: str
    port: int
    path: str = ""
    key: str = ""

    @classmethod
    def of(cls, url: str, key: str = "") -> Address:
        """Return the address that an http URL names.

        Raises:
            InvalidInputError: it is no such URL.
        """
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port:
            raise InvalidInputError(
                f"{quote(url)} is not the URL of a server; write http://127.0.0.1:8000"
            )
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host=parts.hostname, port=port, path=path, key=key)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.path}"


@dataclass(kw_only=True)
class Heard:
    """What a client heard of one answer. Times are those of `time.monotonic`.

    Attributes:
        sent: when it asked.
        times: when each piece of text came.
        ended: when the answer had ended; None for one that the client left, or that failed.
        tokens: tokens of the answer, as the server counts them; of one that was left, its pieces.
        text: the answer.
        error: what the server refused; None for nothing.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    ended: float | None = None
    tokens: int = 0
    text: str = ""
    error: str | None = None


class Connection:
    """One client's connection, which is opened when it is first used and stays open.

    Args:
        address: the server.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: dict[str, Any], leave_after: int | None, heard: Heard) -> None:
        """Ask for a completion as a stream, and note what comes.

        Args:
            body: of `/v1/completions`.
            leave_after: pieces of text after which the client leaves; None to stay.
            heard: where to note it.
        """
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        async for piece in self.request("POST", "/v1/completions", body | usage):
            for line in piece.splitlines():
                if line.startswith(_DATA):
                    _note(line[len(_DATA) :], heard)
            if leave_after is not None and len(heard.times) >= leave_after:
                self.close()
                return
        heard.ended = time.monotonic()

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[bytes]:
        """Yield the pieces of an answer.

        Raises:
            StarAttentionError: the server refuses, or the connection ends.
        """
        try:
            reader, writer = await self._open()
            writer.write(self._head(method, path, body))
            status, headers = await _read_head(reader)
            if status >= 400:
                pieces = [piece async for piece in _pieces(reader, headers)]
                raise StarAttentionError(f"{path}: {status} {b''.join(pieces).decode()[:300]}")
            async for piece in _pieces(reader, headers):
                yield piece
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise StarAttentionError(f"{path}: {type(error).__name__}: {error}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            address = self._address
            self._streams = await asyncio.open_connection(
                address.host, address.port, limit=_MOST_LINE
            )
        return self._streams

    def _head(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        address = self._address
        lines = [f"{method} {address.path}{path} HTTP/1.1", f"Host: {address.host}:{address.port}"]
        lines += [f"Content-Length: {len(data)}", "Content-Type: application/json"]
        lines += [f"Authorization: Bearer {address.key}"] if address.key else []
        return "\r\n".join([*lines, "", ""]).encode() + data


def _note(data: bytes, heard: Heard) -> None:
    if data == b"[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        heard.error = str(event["error"].get("message"))
        return
    for choice in event["choices"]:
        if choice["text"]:
            heard.times.append(time.monotonic())
            heard.text += choice["text"]
    usage = event.get("usage")
    heard.tokens = len(heard.times) if usage is None else int(usage["completion_tokens"])


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in head[1:] if line)
    return int(head[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", "0")))
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:size]
    await reader.readline()


async def object_of(
    address: Address, method: str, path: str, body: dict[str, Any] | None = None
) -> Any:
    """Return the JSON value, or the text, that a request is answered with.

    Raises:
        StarAttentionError: the server refuses, or cannot be reached.
    """
    connection = Connection(address)
    try:
        data = b"".join([piece async for piece in connection.request(method, path, body)])
    finally:
        connection.close()
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()
