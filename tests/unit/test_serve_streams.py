"""Streams of `serve`: whole characters, signs of life, and a reader that is slow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from star_attention.serve.http.app import make_app
from tests.servers import ASK, DOCUMENT, Server, eventually, in_parts, running, saying
from tests.talkers import byte_level, talker

CHAT = "/v1/chat/completions"
LONG = DOCUMENT * 12


def events(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, which ends as it must."""
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1] if line.startswith("data: ")]


def contents(stream: list[dict[str, Any]]) -> list[str]:
    return [
        choice["delta"]["content"]
        for each in stream
        for choice in each["choices"]
        if choice["delta"].get("content")
    ]


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """A server that reads a document in many small forwards, and says so at once."""
    with running(keepalive=0.02, heartbeat=0.06) as server:
        yield server


def test_signs_of_life_while_a_document_is_read(slow: Server) -> None:
    """Forbids silence, after which clients and proxies give up: comments do not count for all."""
    body = {"messages": in_parts(LONG, "Who?", mark=True), "max_tokens": 3, "stream": True}
    text = slow.post(CHAT, body).text
    first, *rest = text.split("\n\n")
    assert json.loads(first[6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    start = [line for line in rest if not line.startswith("data: [DONE]")]
    comments = [line for line in start if line.startswith(": keepalive encode ")]
    assert comments
    done, total = comments[-1].rsplit(" ", 1)[1].split("/")
    assert 0 <= int(done) <= int(total) > 1000
    empty = [each for each in events(text)[1:] if each["choices"][0]["delta"] == {"content": ""}]
    assert empty


def test_progress_for_those_who_ask(slow: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("star_attention.serve.http.answering.PROGRESS_S", 0.02)
    body = {
        "messages": in_parts("Other." + LONG, "Who?", mark=True),
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_progress": True},
    }
    stream = events(slow.post(CHAT, body).text)
    steps = [each["star"] for each in stream if "star" in each]
    assert steps[0]["phase"] == "encode"
    assert max(step["done"] for step in steps) > steps[0]["done"]


def test_headers(slow: Server) -> None:
    """Forbids that a proxy collects a stream before it passes it on."""
    body = {"messages": ASK, "max_tokens": 2, "stream": True}
    response = slow.post(CHAT, body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-star-cache"] == "none"
    assert "content-length" not in response.headers


@pytest.mark.parametrize("text", ["naïve 🦦🦦 日本語 é", "👩‍👩‍👧‍👦 ends in 🦦"])
def test_characters_of_several_tokens(text: str) -> None:
    """Forbids halves of characters, and characters twice."""
    tokenizer = byte_level(chat="{{ messages[0].content }}")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "the cat"}]}
    with running(talker(tokenizer), before=saying(text)) as server:
        whole = server.post(CHAT, body).json()
        stream = events(server.post(CHAT, body | {"stream": True}).text)
    assert whole["choices"][0]["message"]["content"] == text
    assert "".join(contents(stream)) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in contents(stream))


def test_a_slow_reader_gets_larger_pieces() -> None:
    """Forbids an endless queue for a client that does not read."""
    with running() as server:
        app = make_app(server.service, None)
        body = json.dumps(
            {"messages": ASK, "max_tokens": 200, "ignore_eos": True, "stream": True}
        ).encode()
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            if not sent and not received:
                received.append(True)
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.sleep(60)
            raise AssertionError("the answer takes too long")

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                sent.append(message["body"])
                while len(sent) == 3 and server.service.engine.batch.running:
                    await asyncio.sleep(0.01)

        received: list[bool] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "headers": [(b"host", b"localhost")],
            "query_string": b"",
        }
        asyncio.run(app(scope, receive, send))
        whole = server.post(CHAT, json.loads(body) | {"stream": False}).json()
        assert eventually(server.is_idle)
    pieces = contents(events(b"".join(sent).decode()))
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert len(pieces) < 10


def test_the_app_without_a_socket() -> None:
    """The same app answers in-process, as tests of other programs would call it."""
    with running() as server:

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=make_app(server.service, None))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as app:
                return await app.post(CHAT, json={"messages": ASK, "max_tokens": 3})

        response = asyncio.run(ask())
        assert response.status_code == 200
        assert response.json() | {"id": 0, "created": 0} == server.post(
            CHAT, {"messages": ASK, "max_tokens": 3}
        ).json() | {"id": 0, "created": 0}
