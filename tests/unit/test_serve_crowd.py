"""Many clients that come, go, send rubbish and leave: nothing is lost, and nothing is left."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from star_attention import EncodedContext
from tests.servers import ASK, DOCUMENT, Server, engine, eventually, in_parts, running

CHAT = "/v1/chat/completions"
CONTEXTS = "/v1/contexts"


class Visitor:
    """A client that does something else each time."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.random = server, random.Random(seed)

    def visit(self) -> str:
        name = self.random.choice(("ask", "leave", "drop", "rubbish", "keep", "delete", "refused"))
        getattr(self, name)()
        return name

    def body(self, **more: Any) -> dict[str, Any]:
        document = DOCUMENT[: 600 + 400 * self.random.randrange(6)]
        messages = self.random.choice([ASK, in_parts(document, "Who?", mark=True)])
        return {"messages": messages, "max_tokens": 8, "ignore_eos": True, **more}

    def ask(self) -> None:
        answer = self.server.post(CHAT, self.body())
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8

    def leave(self) -> None:
        """Leave in the middle of a stream."""
        body = self.body(stream=True, max_tokens=5000)
        with httpx.stream("POST", f"{self.server.url}{CHAT}", json=body, timeout=30) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number > self.random.randrange(20):
                    break

    def drop(self) -> None:
        """Leave before there is an answer."""
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{self.server.url}{CHAT}", json=self.body(max_tokens=5000), timeout=0.05)

    def rubbish(self) -> None:
        data = self.random.randbytes(200)
        with self.server.raw("POST /v1/files HTTP/1.1\nHost: localhost\n", data):
            pass

    def keep(self) -> None:
        self.server.post(f"{CONTEXTS}?wait=true", {"text": DOCUMENT[: self.random.randrange(900)]})

    def delete(self) -> None:
        for context in self.server.get(CONTEXTS).json()["data"][:2]:
            httpx.delete(f"{self.server.url}{CONTEXTS}/{context['id']}")

    def refused(self) -> None:
        assert self.server.post(CHAT, {"messages": ASK, "n": 99}).status_code == 400


def crowd(server: Server, visitors: int, visits: int) -> None:
    def run(seed: int) -> None:
        visitor = Visitor(server, seed)
        for _ in range(visits):
            visitor.visit()

    with ThreadPoolExecutor(visitors) as pool:
        for done in [pool.submit(run, seed) for seed in range(visitors)]:
            done.result()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("visitors", "visits"), [(6, 6), pytest.param(20, 30, marks=pytest.mark.slow)]
)
def test_nothing_is_left_of_a_crowd(visitors: int, visits: int) -> None:
    with running(max_rows=8) as server:
        serve_crowds(server, visitors, visits)
    del server
    gc.collect()
    assert [each for each in gc.get_objects() if type(each) is EncodedContext] == []


def serve_crowds(server: Server, visitors: int, visits: int) -> None:
    crowd(server, 2, 3)
    assert eventually(server.is_idle)
    before = descriptors(), threading.active_count()
    crowd(server, visitors, visits)
    assert eventually(server.is_idle, 120)
    answer = server.post(CHAT, {"messages": ASK, "max_tokens": 3})
    assert answer.status_code == 200
    assert eventually(lambda: (descriptors(), threading.active_count()) <= before)
    for context in server.get(CONTEXTS).json()["data"]:
        httpx.delete(f"{server.url}{CONTEXTS}/{context['id']}")
    assert eventually(lambda: sum(places(server)) == 0)


def places(server: Server) -> list[float]:
    """Return the contexts at each place."""
    text = server.service.metrics.text().decode()
    lines = [line for line in text.splitlines() if line.startswith("star:contexts{")]
    assert lines
    return [float(line.rpartition(" ")[2]) for line in lines]


@pytest.mark.slow
def test_clients_of_one_document_get_the_answers_of_one_client() -> None:
    """Whatever runs beside it, an answer is the same: greedy, in float32, of 4K tokens."""
    book = (Path(__file__).parents[2] / "examples/book.txt").read_text(encoding="utf-8")[:16_000]
    places = ("quiet-harbor", "the lamp", "two seals", "bread", "March", "the tower", "rain", "oil")

    def ask(server: Server, place: str) -> str:
        messages = in_parts(book, f"\nWhat is said of {place}?", mark=True)
        body = {"messages": messages, "max_tokens": 32, "ignore_eos": True, "temperature": 0}
        answer = server.post(CHAT, body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    with running(engine()) as server, ThreadPoolExecutor(len(places)) as pool:
        alone = [ask(server, place) for place in places]
        assert len(set(alone)) > 1
        assert server.metric("encodes_total", outcome="done") == 1
        for _ in range(2):
            assert list(pool.map(lambda place: ask(server, place), places)) == alone
        assert server.metric("encodes_total", outcome="done") == 1
