"""The short way of a stream's tokens: no task wakes for them, and nothing of a stream changes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest

from star_attention.generation.result import Delta
from star_attention.serve.http.answering import Answering
from star_attention.serve.http.line import Line
from star_attention.serve.http.objects import ChatShape, TextShape
from tests.servers import ASK, Server, running

CHAT = "/v1/chat/completions"
BODY = {"messages": ASK, "max_tokens": 40, "ignore_eos": True}


def spoken(text: str) -> dict[int, str]:
    """Return the text of each answer of a stream."""
    blocks = [block[6:] for block in text.split("\n\n") if block.startswith("data: ")]
    assert blocks.pop() == "[DONE]"
    said: dict[int, str] = {}
    for block in blocks:
        for choice in json.loads(block)["choices"]:
            more = choice["delta"].get("content") or ""
            said[choice["index"]] = said.get(choice["index"], "") + more
    return said


def whole(server: Server, body: dict[str, Any]) -> dict[int, str]:
    choices = server.post(CHAT, body).json()["choices"]
    return {choice["index"]: choice["message"]["content"] for choice in choices}


def streamed(server: Server, body: dict[str, Any]) -> dict[int, str]:
    return spoken(server.post(CHAT, body | {"stream": True}).text)


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return counts of the pieces that go the short way, and of those for which a task wakes."""
    counts: Counter[str] = Counter()
    write, pieces = Line.write, Answering._pieces

    def counted_write(self: Line, piece: bytes) -> None:
        counts["short"] += 1
        write(self, piece)

    async def counted_pieces(self: Answering, ended: set[int]) -> bytes:
        sent = await pieces(self, ended)
        counts["long"] += bool(sent)
        return sent

    monkeypatch.setattr(Line, "write", counted_write)
    monkeypatch.setattr(Answering, "_pieces", counted_pieces)
    return counts


def test_tokens_wake_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counting(monkeypatch)
    with running() as server:
        assert streamed(server, BODY) == whole(server, BODY)
    # The first token may come together with the opening, and the last one with the end.
    assert counts["short"] >= 30
    assert counts["long"] <= 4


@pytest.mark.parametrize("several", [1, 3])
def test_pieces_keep_their_order_when_the_line_is_closed_at_times(
    monkeypatch: pytest.MonkeyPatch, several: int
) -> None:
    """A client that reads slowly closes it: tokens wait then, and none overtakes another."""
    counts, is_open = counting(monkeypatch), itertools.cycle([True, True, False, True, False])
    monkeypatch.setattr(Line, "is_open", property(lambda self: next(is_open)))
    body = BODY | {"n": several, "temperature": 1.0, "seed": 5}
    with running() as server:
        assert streamed(server, body) == whole(server, body)
    assert counts["short"] >= 5
    assert counts["long"] >= 5


def test_a_client_without_chunks_gets_none() -> None:
    """HTTP/1.0 knows no chunks: there the body is what comes until the connection ends."""
    body = json.dumps(BODY | {"stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.0\nHost: 127.0.0.1\nContent-Length: {len(body)}\n\n"
    with running() as server:
        with server.raw(head, body) as connection:
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head_sent, _, sent = answer.decode().partition("\r\n\r\n")
        assert "chunked" not in head_sent
        assert spoken(sent) == whole(server, BODY)


@pytest.mark.parametrize("shape", [ChatShape.new("a model", True), TextShape.new("a model", False)])
@pytest.mark.parametrize("index", [0, 3])
def test_pieces_are_chunks(shape: ChatShape | TextShape, index: int) -> None:
    """They are put together of parts that are written once."""
    for text in ("a", 'q"uo\\te\n', "日本 🦦", "\ud83e", "a piece of an answer", '", "x": "'):
        wanted = shape._chunk(shape.more(index, Delta(text=text)))
        assert shape.piece(index, Delta(text=text)) == wanted
        assert json.loads(wanted[6:])["choices"][0]["index"] == index
    thought = Delta(text="", reasoning="hm")
    assert shape.piece(index, thought) == shape._chunk(shape.more(index, thought))
