"""What clients send, written down with placeholders, so that it can be sent again without them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.servers import DOCUMENT

FILE = Path(__file__).with_name("requests.json")
KEY = "key-of-ann"
DOCUMENT_HERE, KEY_HERE = "{document}", "{key}"

_MADE = re.compile(rb'"id":"((?:file-|resp_|ctx_)[0-9a-f]+)"')
"""What later requests may name."""
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_OF_THE_CONNECTION = ("accept-encoding", "connection", "content-length", "host")
_OF_THE_MACHINE = ("x-stainless-arch", "x-stainless-os", "x-stainless-runtime-version")


class Recorder:
    """An app that notes its requests before another one answers them.

    Args:
        app: the other one.

    Attributes:
        requests: the requests, with the status of their answers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        request = {"method": scope["method"], "path": scope["path"]}
        self.requests.append(request)

        async def noted_receive() -> Any:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        async def noted_send(message: Any) -> None:
            made = _MADE.search(message.get("body", b"")[:200])
            if made is not None:
                request.setdefault("made", made[1].decode())
            if message["type"] == "http.response.start":
                request.update(
                    status=message["status"],
                    headers=_headers(scope["headers"]),
                    body=_body(body),
                )
            await send(message)

        await self._app(scope, noted_receive, noted_send)


def _headers(raw: list[tuple[bytes, bytes]]) -> dict[str, str]:
    headers = {name.decode(): value.decode() for name, value in raw}
    for name in (*_OF_THE_CONNECTION, *_OF_THE_MACHINE):
        headers.pop(name, None)
    return {name: value.replace(KEY, KEY_HERE) for name, value in headers.items()}


def _body(data: bytes) -> Any:
    """Return a body as it is, but for the document: JSON as such, a form as text."""
    text = data.decode()
    try:
        return _with(json.loads(text), DOCUMENT, DOCUMENT_HERE)
    except ValueError:
        return text.replace(DOCUMENT, DOCUMENT_HERE)


class Player:
    """Sends recorded requests again, of which each answer has only a few tokens.

    Args:
        client: sends them to an app that has the key.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._names = {KEY_HERE: KEY, DOCUMENT_HERE: DOCUMENT}

    async def send(self, request: dict[str, Any]) -> httpx.Response:
        """Send a request; what it names is what was made for the ones before it."""
        body = request["body"]
        for old, new in self._names.items():
            body = _with(body, old, new)
        if isinstance(body, dict) and request["status"] == 200:
            body |= {name: 4 for name in _LIMITS if name in body}
        response = await self._client.request(
            request["method"],
            self._named(request["path"]),
            headers={name: self._named(value) for name, value in request["headers"].items()},
            content=(body if isinstance(body, str) else json.dumps(body)).encode(),
        )
        made = _MADE.search(response.content[:200])
        if made is not None and "made" in request:
            self._names[request["made"]] = made[1].decode()
        return response

    def _named(self, text: str) -> str:
        for old, new in self._names.items():
            text = text.replace(old, new)
        return text


def _with(value: Any, old: str, new: str) -> Any:
    """Return a value with a text replaced wherever it is."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_with(each, old, new) for each in value]
    if isinstance(value, dict):
        return {key: _with(each, old, new) for key, each in value.items()}
    return value
