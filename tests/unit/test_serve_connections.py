"""Connections that hold a place and do nothing: each has an end, over a real socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

from star_attention.serve import connection
from tests.servers import ASK, Server, running

HEAD_S = 0.4
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_HEAD_S", HEAD_S)


def read_all(client: socket.socket) -> bytes:
    """Return what comes until the server ends the connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def receive_until(client: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += client.recv(65536)
    return data


def dribble(client: socket.socket) -> bool:
    """Send a head without an end, a byte now and then; True once the server ends the connection."""
    client.settimeout(HEAD_S / 10)
    for byte in b"GET /health HTTP/1.1\r\nx: " + b"x" * 200:
        try:
            client.sendall(bytes([byte]))
            if not client.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


@pytest.mark.usefixtures("short")
def test_a_head_that_comes_a_byte_at_a_time(server: Server) -> None:
    """Forbids that a client which sends a head for ever has a connection for ever."""
    with server.raw("") as client:
        assert dribble(client)


@pytest.mark.usefixtures("short")
def test_half_a_head_is_answered(server: Server) -> None:
    with server.raw("GET /health HTTP/1.1\nx: ") as client:
        head, _, data = read_all(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(data)["error"]["code"] == "head_timeout"


@pytest.mark.usefixtures("short")
def test_a_connection_without_a_byte(server: Server) -> None:
    with server.raw("") as client:
        assert read_all(client) == b""


@pytest.mark.usefixtures("short")
def test_a_second_head_has_the_same_limit(server: Server) -> None:
    """Forbids that a request which was answered frees its connection of all limits."""
    with server.raw("") as client:
        client.sendall(HEALTH)
        assert b"200 OK" in receive_until(client, b"}")
        # Between two requests, uvicorn's own limit holds, which is longer.
        time.sleep(2 * HEAD_S)
        client.sendall(HEALTH)
        assert b"200 OK" in receive_until(client, b"}")
        assert dribble(client)


@pytest.mark.usefixtures("short")
def test_bodies_and_answers_take_longer_than_heads(server: Server) -> None:
    """Forbids that the limit ends what has a complete head."""
    data = json.dumps({"messages": ASK, "max_tokens": 4}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\nhost: localhost\nconnection: close\n"
        f"content-length: {len(data)}\n\n"
    )
    with server.raw(head, data[:10]) as client:
        time.sleep(2 * HEAD_S)
        client.sendall(data[10:])
        assert read_all(client).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that answers which nobody reads hold their request and its connection for ever."""
    monkeypatch.setattr(connection, "MOST_UNREAD_S", HEAD_S)
    with running() as server:
        name = "book.txt", b"The hill is green. " * 400_000
        made = server.post("/v1/files", files={"file": name}, data={"purpose": "user_data"}).json()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            path = f"/v1/files/{made['id']}/content"
            client.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            time.sleep(4 * HEAD_S)
            client.settimeout(20)
            assert len(read_all(client)) < len(name[1])


def test_a_client_that_reads_slowly_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that the limit ends what moves."""
    monkeypatch.setattr(connection, "MOST_UNREAD_S", HEAD_S)
    with running() as server:
        name = "book.txt", b"The hill is green. " * 400_000
        made = server.post("/v1/files", files={"file": name}, data={"purpose": "user_data"}).json()
        path = f"/v1/files/{made['id']}/content"
        head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        data = b""
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
            client.connect(("127.0.0.1", server.port))
            client.sendall(head.encode())
            for _ in range(32):
                time.sleep(HEAD_S / 8)
                data += client.recv(2**18)
            data += read_all(client)
        assert data.endswith(b"The hill is green. ")
