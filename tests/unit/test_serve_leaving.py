"""What happens when a client leaves, and when the server does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engines import BUNDLED
from tests.servers import ASK, DOCUMENT, NAME, Server, eventually, running

CHAT = "/v1/chat/completions"
CONTEXTS = "/v1/contexts"
LONG = {"messages": ASK, "max_tokens": 30_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def send(server: Server, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """Send a request over a bare socket."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Length: {len(data)}\n\n"
    return server.raw(head, data)


def receive_until(connection: socket.socket, text: bytes) -> bytes:
    data = b""
    while text not in data:
        block = connection.recv(65536)
        assert block, data
        data += block
    return data


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_a_client_that_leaves_while_its_answer_is_generated(
    server: Server, stream: bool, half: bool
) -> None:
    """Forbids generating for nobody; a connection that is closed on one side counts as closed."""
    # Only a stream shows that the first token is there: the other may be left before it.
    phases = ["decode"] if stream else ["encode", "decode"]

    def aborted() -> float:
        return sum(server.metric("request_aborted_total", phase=phase) for phase in phases)

    before = aborted()
    connection = send(server, LONG | {"stream": stream})
    batch = server.service.engine
    if stream:
        receive_until(connection, b'"delta":{"content":"')
    assert eventually(lambda: batch.batch.running == 1)
    if half:
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()
    assert eventually(server.is_idle)
    assert aborted() == before + 1
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_its_context_is_there(stream: bool) -> None:
    with running() as server:
        document = {"role": "user", "content": DOCUMENT * 20}
        connection = send(server, {"messages": [document, *ASK], "stream": stream})
        engine = server.service.engine
        assert eventually(lambda: engine.waiting == 1)
        connection.close()
        assert eventually(server.is_idle)
        assert server.metric("request_aborted_total", phase="encode") == 1
        # Others are served meanwhile.
        answer = server.post(CHAT, {"messages": ASK, "max_tokens": 2})
        assert answer.status_code == 200


def test_a_client_that_leaves_while_it_waits_for_a_context(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Forbids an error 500 in the log, and an answer to nobody."""
    caplog.set_level("INFO")
    before = server.metric("request_errors_total", code="server_error")
    known, moves = len(server.get(CONTEXTS).json()["data"]), threading.Event()
    server.service.engine.post(lambda: moves.wait(60))
    connection = send(server, {"text": "A long text. " * 3000}, f"{CONTEXTS}?wait=true")
    assert eventually(lambda: len(server.get(CONTEXTS).json()["data"]) == known + 1)
    connection.close()
    assert eventually(lambda: " 499 " in caplog.text)
    moves.set()
    assert eventually(server.is_idle)
    assert server.metric("request_errors_total", code="server_error") == before


def test_a_client_that_leaves_in_the_middle_of_its_request(server: Server) -> None:
    connection = server.raw(
        f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: 500\n\n", b'{"messages": ['
    )
    connection.close()
    assert eventually(server.is_idle)
    assert server.get("/health").status_code == 200


def test_rubbish_ends_nothing(server: Server) -> None:
    for head in ("\0\1\2\n\n", "GET /nowhere HTTP/9.9\n\n", "POST /v1/chat/completions\n\n"):
        with server.raw(head) as connection:
            assert b" 40" in connection.recv(65536).partition(b"\r\n")[0]
    assert server.get("/ready").status_code == 200


def test_more_requests_than_the_server_takes() -> None:
    with running(max_waiting=2, max_rows=1) as server:
        connections = [send(server, LONG | {"stream": True}) for _ in range(2)]
        assert eventually(lambda: server.service.open == 2)
        response = server.post(CHAT, {"messages": ASK})
        assert response.status_code == 429
        assert 0 < int(response.headers["retry-after"]) <= 120
        assert response.json()["error"]["code"] == "too_many_requests"
        assert "2 requests are open" in response.json()["error"]["message"]
        with server.client() as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=NAME, messages=ASK)
        for path in ("/v1/contexts", "/v1/files", "/v1/completions"):
            assert server.post(path, {"text": "A"}).status_code == 429
        for connection in connections:
            connection.close()
        assert eventually(server.is_idle)
        assert server.post(CHAT, {"messages": ASK, "max_tokens": 2}).status_code == 200


def test_a_request_beyond_its_time() -> None:
    """Forbids that clients repeat it by themselves, or that it runs on."""
    with running(request_timeout=0.3) as server:
        response = server.post(CHAT, LONG)
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        assert "longer than 0.3 seconds" in response.json()["error"]["message"]
        with server.client(max_retries=2) as client, pytest.raises(openai.APIError) as error:
            for _ in client.chat.completions.create(
                model=NAME,
                messages=ASK,
                max_tokens=30_000,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                pass
        assert error.value.code == "request_timeout"
        assert eventually(server.is_idle)


def test_an_error_after_the_first_byte_is_one_that_clients_raise(server: Server) -> None:
    """Forbids a stream that ends as if its answer were complete."""
    engine = server.service.engine

    def fail() -> None:
        def raises() -> None:
            raise RuntimeError("a kernel has failed")

        engine.batch.step = raises  # type: ignore[method-assign,assignment]

    with server.client() as client:
        stream = client.chat.completions.create(
            model=NAME, messages=ASK, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        texts = [next(iter(stream)) for _ in range(4)]
        engine.post(fail)
        with pytest.raises(openai.APIError, match=r"the server failed \(RuntimeError\)"):
            texts += list(stream)
        assert len(texts) == 4
        # The engine goes on with a new batch.
        again = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=3)
        assert again.choices[0].message.content
    assert eventually(server.is_idle)


def test_health_while_the_engine_hangs() -> None:
    """Forbids 200 while nothing moves, and 503 once it moves again."""
    moves = threading.Event()
    with running(engine_stall=1) as server:
        server.service.engine.post(lambda: moves.wait(60))
        assert eventually(lambda: server.get("/health").status_code == 503)
        error = server.get("/ready").json()["error"]
        assert error["code"] == "engine_hangs"
        moves.set()
        assert eventually(lambda: server.get("/health").status_code == 200)


def test_answers_under_way_end_before_the_server_does() -> None:
    with running(drain_timeout=120.0) as server:
        connection = send(
            server, {"messages": ASK, "max_tokens": 200, "ignore_eos": True, "stream": True}
        )
        receive_until(connection, b'"delta":{"content":"')
        server.service.draining = True
        error = server.get("/ready").json()["error"]
        assert error["code"] == "shutting_down"
        refused = server.post(CHAT, {"messages": ASK})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert server.get("/health").status_code == 200
        data = receive_until(connection, b"[DONE]")
        assert b'"finish_reason":"length"' in data
        connection.close()


def test_answers_that_take_too_long_at_the_end_get_an_error() -> None:
    with running(drain_timeout=0.2) as server:
        connection = send(server, LONG | {"stream": True})
        receive_until(connection, b'"delta":{"content":"')
        server.service.draining = True
        data = receive_until(connection, b"[DONE]")
        assert b'"code":"shutting_down"' in data
        connection.close()


@pytest.mark.slow
def test_a_signal_ends_the_program(tmp_path: Path) -> None:
    """Forbids an exit status other than 0, and a stream that is cut."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = ["-m", "star_attention", "serve", "-m", str(BUNDLED), "--port", str(port)]
    with log.open("w") as errors:
        program = subprocess.Popen([sys.executable, *command], stderr=errors, env=os.environ)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    assert eventually(is_ready, 60), log.read_text()
    body = {"messages": ASK, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)
        program.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert program.wait(30) == 0
    text = log.read_text()
    assert f"serving needle-17m at {url}/v1" in text
    assert "secret" not in text
