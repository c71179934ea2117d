"""Texts of requests are read in the event loop only where that is quick: streams wait for it."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from star_attention import StarLLM
from star_attention.hf.text import template
from star_attention.serve import documents, prompts
from star_attention.serve import lanes as lanes_module
from star_attention.serve.lanes import Lanes
from star_attention.serve.values import characters_in
from tests.servers import ASK, NOISE, Server, eventually, quick_engine, running

BURN_S = 0.02


def where(star: StarLLM) -> int:
    return threading.get_ident()


def where_slowly(star: StarLLM) -> int:
    end = time.thread_time() + BURN_S
    while time.thread_time() < end:
        pass
    return threading.get_ident()


def ran(work: Callable[[Lanes], Awaitable[list[int]]]) -> list[bool]:
    """Return which readings were in the event loop."""
    lanes, here = Lanes(quick_engine()), threading.get_ident()

    async def run() -> list[int]:
        return await work(lanes)

    try:
        return [thread == here for thread in asyncio.run(run())]
    finally:
        lanes.close()


def test_few_characters_are_read_where_they_are() -> None:
    """No other thread is woken for them, unless it is using the tokenizer."""
    started, goes_on = threading.Event(), threading.Event()
    reading: list[Any] = []

    def read(star: StarLLM) -> int:
        reading.append(star)
        assert len(reading) == 1, "a tokenizer is used by two threads"
        reading.remove(star)
        return threading.get_ident()

    def read_slowly(star: StarLLM) -> int:
        started.set()
        goes_on.wait(20)
        return read(star)

    async def work(lanes: Lanes) -> list[int]:
        await lanes.run(100, where)
        short, long = await lanes.run(100, read), await lanes.run(5000, read)
        of_kept = await lanes.run(100, read, kept=5000)
        slow = asyncio.create_task(lanes.run(5000, read_slowly))
        while not started.is_set():
            await asyncio.sleep(0.001)
        behind = asyncio.create_task(lanes.run(100, read))
        await asyncio.sleep(0.01)
        goes_on.set()
        return [short, long, of_kept, await slow, await behind]

    assert ran(work) == [True, False, False, False, False]


def test_what_was_slow_is_read_beside_the_loop_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forbids that few characters stop all streams because a chat template takes long for them."""

    async def work(lanes: Lanes) -> list[int]:
        threads = [await lanes.run(100, read) for read in (where, where, where_slowly, where)]
        later = time.monotonic() + BURN_S * lanes_module._SHARE + 1
        monkeypatch.setattr(time, "monotonic", lambda: later)
        return [*threads, await lanes.run(100, where), await lanes.run(100, where)]

    # The first is not known to be quick.
    assert ran(work) == [False, True, True, False, True, True]


def test_an_error_counts_as_well() -> None:
    def fail(star: StarLLM) -> int:
        where_slowly(star)
        raise ValueError("no")

    async def work(lanes: Lanes) -> list[int]:
        await lanes.run(100, where)
        with pytest.raises(ValueError, match="no"):
            await lanes.run(100, fail)
        return [await lanes.run(100, where)]

    assert ran(work) == [False]


@pytest.mark.parametrize(
    "value", [[{"role": "user", "content": "é" * 1000}], {"a": [1.5, None, True] * 50}, "a" * 500]
)
def test_characters_are_about_those_of_json(value: Any) -> None:
    exact = len(json.dumps(value, ensure_ascii=False))
    assert 0.7 * exact < characters_in(value) < 1.3 * exact
    assert characters_in(value, most=100) == 100
    assert characters_in([value] * 3, most=10 * exact) == characters_in([value] * 3)


# ----------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Returns the names of threads in which a function of some module will have run."""

    def watch(module: Any, name: str) -> list[str]:
        seen: list[str] = []
        function = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            seen.append(threading.current_thread().name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, watched)
        return seen

    return watch


class Watching(threading.Thread):
    """Reads a long stream without a chat template, and notes when its chunks come."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._url = f"{server.url}/v1/completions"
        self.times: list[float] = []
        self.started, self.ends = threading.Event(), threading.Event()

    def run(self) -> None:
        body = {"prompt": "The sky is", "max_tokens": 9999, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", self._url, json=body, timeout=60) as stream:
            for _ in stream.iter_text():
                self.times.append(time.monotonic())
                self.started.set()
                if self.ends.is_set():
                    break


def test_a_slow_template_stops_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that one client's chat, however short, keeps the tokens of all others back."""
    begun, goes_on = threading.Event(), threading.Event()
    rendered = template.ChatTemplate.render

    def slowly(self: Any, messages: Any, *arguments: Any, **options: Any) -> Any:
        if "slow" in str(messages):
            begun.set()
            assert goes_on.wait(60)
        return rendered(self, messages, *arguments, **options)

    monkeypatch.setattr(template.ChatTemplate, "render", slowly)
    body = {"messages": [{"role": "user", "content": "Is it slow?"}], "max_tokens": 1}
    with running() as server, ThreadPoolExecutor(1) as pool:
        watching = Watching(server)
        watching.start()
        assert watching.started.wait(20)
        answer = pool.submit(server.post, "/v1/chat/completions", body)
        assert begun.wait(20)
        known = len(watching.times)
        try:
            # In the event loop nobody would hear of these before the template goes on.
            assert eventually(lambda: len(watching.times) > known + 3)
        finally:
            goes_on.set()
        assert answer.result().status_code == 200, answer.result().text
        watching.ends.set()
        watching.join(20)


def test_a_document_that_goes_on_is_read_beside_the_loop(
    threads: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids that a word at the end of a book renders the book in the event loop."""
    # A few characters are quick on a slow machine, too.
    monkeypatch.setattr(lanes_module, "_QUICK_S", 60.0)
    seen = threads(prompts, "document")
    with running() as server:
        # Now few characters are known to be quick.
        assert server.post("/v1/contexts?wait=true", {"text": "A word."}).status_code == 201
        assert server.post("/v1/contexts?wait=true", {"text": "A word more."}).status_code == 201
        here = seen[-1]
        assert not here.startswith("star-text")
        book = server.post("/v1/contexts?wait=true", {"text": NOISE * 20}).json()["id"]
        longer = server.post(f"/v1/contexts/{book}/extend?wait=true", {"text": " The end."})
        assert longer.status_code == 201, longer.text
        tools = {"text": "A word.", "chat_template_kwargs": {"documents": ["a" * 5000]}}
        server.post("/v1/contexts?wait=true", tools)
    assert [name.startswith("star-text") for name in seen[-3:]] == [True] * 3


def test_files_in_messages_are_read_beside_the_loop(threads: Callable[..., list[str]]) -> None:
    """Forbids that a long file in a message is decoded in the event loop."""
    seen = threads(documents, "decode")
    data = base64.b64encode(b"The sky is blue.").decode()
    file = {"filename": "sky.txt", "file_data": f"data:text/plain;base64,{data}"}
    parts = [{"type": "file", "file": file}, {"type": "text", "text": "Why?"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    with running() as server:
        loop: list[str] = threads(prompts, "on_context")
        assert server.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 1})
        answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert loop == []
    assert [name.startswith("asyncio_") for name in seen] == [True]
