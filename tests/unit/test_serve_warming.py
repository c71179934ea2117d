"""A server warms up before it says that it is ready."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

from star_attention.generation.batching.warming import warm_up
from star_attention.serve import program
from tests.servers import ASK, eventually, quick_engine, running

CHAT = "/v1/chat/completions"


def test_ready_waits_for_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes before is answered after it."""
    goes_on = threading.Event()

    def held(star: Any, max_rows: int) -> Iterator[str]:
        assert max_rows == 7
        yield "nothing"
        assert goes_on.wait(20)
        yield from warm_up(star, max_rows)

    monkeypatch.setattr(program, "warm_up", held)
    with running(max_rows=7, warm_up=True) as server:
        refusal = server.get("/ready")
        assert refusal.status_code == 503
        assert refusal.json()["error"]["code"] == "warming_up"
        assert server.get("/health").status_code == 200
        answers: list[Any] = []
        body = {"messages": ASK, "max_tokens": 3}
        asking = threading.Thread(target=lambda: answers.append(server.post(CHAT, body)))
        asking.start()
        goes_on.set()
        assert eventually(lambda: server.get("/ready").status_code == 200)
        asking.join(20)
        assert [answer.status_code for answer in answers] == [200]


def test_a_warm_up_that_fails_is_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(star: Any, max_rows: int) -> Iterator[str]:
        yield "a piece"
        raise RuntimeError("no room")

    monkeypatch.setattr(program, "warm_up", fails)
    with running(warm_up=True) as server:
        assert eventually(lambda: server.get("/ready").status_code == 200)
        assert server.post(CHAT, {"messages": ASK, "max_tokens": 3}).status_code == 200
    assert "warming up failed" in caplog.text


def test_a_server_that_warms_up_can_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def endless(star: Any, max_rows: int) -> Iterator[str]:
        try:
            while True:
                yield "more"
        finally:
            ended.set()

    monkeypatch.setattr(program, "warm_up", endless)
    with running(warm_up=True) as server:
        assert server.get("/ready").status_code == 503
    assert eventually(ended.is_set)


def test_a_warm_up_encodes_and_answers_and_leaves_nothing() -> None:
    star = quick_engine()
    assert [*warm_up(star, 4)] == ["a context of 64 tokens", "a query of 1 token"]


def test_collections_pass_over_what_was_there_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that an answer waits while all of torch's objects are looked at."""
    monkeypatch.setattr(program, "gc", gc)
    gc.unfreeze()
    try:
        with running() as server:
            assert eventually(lambda: server.service.engine.is_warm)
            assert gc.get_freeze_count() > 100_000
        assert gc.get_freeze_count() == 0
    finally:
        gc.collect()
        gc.freeze()
