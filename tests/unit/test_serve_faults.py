"""Faults inside a server: too little memory, a long text, a model that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from star_attention.errors import OutOfMemoryError
from star_attention.generation.batching import scheduler
from tests.servers import ASK, DOCUMENT, NAME, Server, eventually, in_parts, running
from tests.talkers import CHATML_TOKENS, byte_level, say, talker

CHAT = "/v1/chat/completions"
SHORT = {"messages": ASK, "max_tokens": 3}


@pytest.fixture
def server() -> Iterator[Server]:
    with running(max_conversations=0) as server:
        yield server


def fail_prefills(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Have the first forward of answers run out of memory, so many times."""
    prefill, left = scheduler.prefill, [times]

    def failing(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OutOfMemoryError("no memory for the query")
        return prefill(*arguments)

    monkeypatch.setattr(scheduler, "prefill", failing)


def test_too_little_memory_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids an error to a client while contexts that nobody uses hold the memory."""
    kept = {"messages": in_parts(DOCUMENT, "Who?", mark=True), "max_tokens": 2}
    assert server.post(CHAT, kept).status_code == 200
    assert server.metric("contexts", location="device") == 1
    fail_prefills(monkeypatch, 1)
    assert server.post(CHAT, SHORT).status_code == 200
    assert server.metric("contexts", location="device") == 0
    assert server.metric("contexts", location="cold") == 1
    assert server.post(CHAT, kept).status_code == 200


def test_too_little_memory_for_good(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that one request ends the engine, and that clients repeat it.

    Nothing is kept here that could make room.
    """
    fail_prefills(monkeypatch, 1)
    response = server.post(CHAT, SHORT)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "out_of_memory"
    assert server.post(CHAT, SHORT).status_code == 200
    fail_prefills(monkeypatch, 1)
    with server.client(max_retries=2) as client, pytest.raises(openai.APIError) as error:
        list(client.chat.completions.create(model=NAME, messages=ASK, stream=True))
    assert error.value.code == "out_of_memory"
    assert eventually(server.is_idle)


def test_a_document_that_never_fits() -> None:
    with running(max_context_bytes=50_000) as server:
        body = {"messages": in_parts(DOCUMENT, "Who?", mark=True)}
        response = server.post(CHAT, body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_too_large"
        assert "50,000" in response.json()["error"]["message"]
        assert server.post(CHAT, SHORT).status_code == 200


def test_a_long_text_holds_up_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that a book which is tokenized blocks health checks, or short questions."""
    monkeypatch.setattr("star_attention.serve.lanes.LONG_CHARACTERS", 1000)
    started, goes_on = threading.Event(), threading.Event()
    (_, (star, _)) = server.service.lanes.lanes
    tokenize = star.tokenizer.__class__.__call__

    class Slow(star.tokenizer.__class__):  # type: ignore[name-defined,misc]
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            started.set()
            assert goes_on.wait(20)
            return tokenize(self, *arguments, **options)

    star.tokenizer.__class__ = Slow
    long = {"prompt": DOCUMENT, "max_tokens": 1}
    answers: list[int] = []
    client = threading.Thread(
        target=lambda: answers.append(server.post("/v1/completions", long).status_code)
    )
    client.start()
    assert started.wait(20)
    assert server.get("/health").status_code == 200
    assert server.post(CHAT, SHORT).status_code == 200
    assert not answers
    goes_on.set()
    client.join(60)
    assert answers == [200]


def test_an_engine_that_fails_again_and_again() -> None:
    """Forbids a server that says it is well, and answers nothing."""
    failure = RuntimeError("the device is lost")

    def fails() -> None:
        raise failure

    def break_for_good(server: Server) -> None:
        star = server.service.star
        make = star.batch

        def broken(**options: Any) -> Any:
            batch = make(**options)
            batch.step = fails  # type: ignore[method-assign,assignment]
            return batch

        star.batch = broken  # type: ignore[method-assign]
        server.service.engine.batch.step = fails  # type: ignore[method-assign,assignment]

    def serve() -> None:
        with running() as server:
            try:
                server.service.engine.post(lambda: break_for_good(server))
                assert eventually(lambda: not server.service.engine.alive)
            finally:
                vars(server.service.star).pop("batch", None)

    with pytest.raises(RuntimeError, match="the device is lost"):
        serve()


def test_reasoning_is_apart() -> None:
    """Forbids a model's thoughts in the content, streamed or not."""
    tokens = byte_level((*CHATML_TOKENS, "<think>", "</think>"), chat=THINKING)
    star, said = talker(tokens), say(tokens, "<think>\nIt is a cat.\n</think>\n\nA cat.")
    with running(star) as server:
        add = server.service.engine.batch.add

        def adding(context: Any, query: Any, **options: Any) -> Any:
            return add(context, query, **(options | said))

        server.service.engine.batch.add = adding  # type: ignore[method-assign]
        with server.client() as client:
            whole = client.chat.completions.create(model=NAME, messages=ASK)
            message = whole.choices[0].message
            assert message.content == "A cat."
            assert message.reasoning_content.strip() == "It is a cat."  # type: ignore[attr-defined]
            said |= say(tokens, "<think>\nIt is a cat.\n</think>\n\nA cat.")
            options: Any = dict(stream=True, stream_options={"include_usage": True})
            *chunks, last = client.chat.completions.create(model=NAME, messages=ASK, **options)
            deltas = [chunk.choices[0].delta for chunk in chunks]
    thought = tokens("<think>\nIt is a cat.\n</think>").input_ids
    for usage in (whole.usage, last.usage):
        assert usage is not None
        assert usage.completion_tokens > len(thought)
        assert usage.completion_tokens_details.reasoning_tokens == len(thought)
    assert "".join(delta.content or "" for delta in deltas) == "A cat."
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thoughts.strip() == "It is a cat."


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{# <think></think> #}"
)
