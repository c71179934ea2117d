"""What a request costs beside its answer: nothing that a server need not do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import torch

from star_attention import StarLLM
from star_attention.errors import ContextMismatchError
from star_attention.hf.execution.capture import Recorder
from star_attention.hf.loading import fingerprint
from star_attention.serve.http.events import ClientLeftError, EventStream
from star_attention.serve.outbox import Outbox
from star_attention.storage.kept import kept_row
from star_attention.storage.tail import Tail
from tests.engines import bundled_tokenizer, random_text_model
from tests.servers import ASK, quick_engine, running


class Wire:
    """A transport that remembers what it sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 100

    def close(self) -> None:
        self.closed = True


def test_a_head_leaves_with_what_follows() -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n"

    async def write() -> list[bytes]:
        wire = Wire()
        outbox: Any = Outbox(wire, asyncio.get_running_loop())  # type: ignore[arg-type]
        outbox.write(head)
        assert wire.sent == []
        assert outbox.get_write_buffer_size() == 100 + len(head)
        outbox.write(b"piece")
        # Pieces of a stream do not wait for each other.
        outbox.write(b"piece")
        assert outbox.get_write_buffer_size() == 100
        outbox.write(head)
        await asyncio.sleep(0)
        outbox.write(head)
        outbox.close()
        assert outbox.is_closing()
        # Nothing follows a close, as on any transport.
        outbox.write(b"late")
        await asyncio.sleep(0)
        return wire.sent

    assert asyncio.run(write()) == [head + b"piece", b"piece", head, head]


def test_no_question_reads_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that a question waits for the step under way, which reading from a GPU does.

    Once the server has ended, the engine looks at its model again.
    """
    star = StarLLM(quick_engine().model, bundled_tokenizer(), block_size=64, anchor_size=64)
    read, weights = [], fingerprint.weights

    def counted(model: Any) -> int:
        read.append(model)
        return weights(model)

    monkeypatch.setattr(fingerprint, "weights", counted)
    with running(star) as server:
        id = server.post("/v1/contexts?wait=true", {"text": "The sky is blue."}).json()["id"]
        read.clear()
        for question in ("Why?", "Since when?"):
            body = {"context": id, "prompt": question, "max_tokens": 2}
            assert server.post("/v1/completions", body).status_code == 200
        assert read == []
    context = star.encode("The sky is blue.")
    weight = star.model.lm_head.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(ContextMismatchError):
            star.generate(context, "Why?", max_new_tokens=2)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_graphs_of_a_server_stay_valid_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question, and each answer that ends, would look where all weights are.

    Once the server has ended, a change is seen.
    """
    star = StarLLM(random_text_model())
    validity, addresses = Recorder(star.runtime.handle).validity(), fingerprint.addresses
    looked: list[Any] = []

    def counted(model: Any) -> int:
        looked.append(model)
        return addresses(model)

    monkeypatch.setattr(fingerprint, "addresses", counted)
    star.runtime.handle.is_frozen = True
    assert validity.has_ended()
    assert [validity.has_ended() for _ in range(3)] == [False] * 3
    assert len(looked) == 1
    star.runtime.handle.is_frozen = False
    assert not validity.has_ended()
    weight = star.model.lm_head.weight
    weight.data = weight.detach().clone()
    assert validity.has_ended()


@pytest.mark.parametrize("copies", [True, False])
def test_kept_keys_and_values_are_those_of_each_layer(*, copies: bool) -> None:
    """Layers of one shape are copied together, and hold nothing of the buffers' room."""
    shapes = [(2, 8), (2, 8), (3, 4)]
    tails = []
    for heads, size in shapes:
        tail = Tail()
        tail.append(torch.randn(1, heads, 70, size), torch.randn(1, heads, 70, size))
        tails.append(tail)
    kept = kept_row([*tails[:2], Tail(), tails[2]], 0, 0, 50, copies=copies)
    assert kept[2] is None
    for tail, pair in zip(tails, [*kept[:2], kept[3]], strict=True):
        assert pair is not None
        for tensor, whole in zip(pair, tail.pair(), strict=True):
            assert torch.equal(tensor, whole[:, :, :50])
            shares = tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            # 70 tokens of room are too many for 50, so that both are copies.
            assert not shares
            assert tensor.is_contiguous()


def test_a_stream_opens_before_its_first_token() -> None:
    """Its head waits a moment for what comes first, and not for the model."""
    goes_on = threading.Event()
    body = {"messages": ASK, "max_tokens": 3, "stream": True}
    with running() as server:
        server.service.engine.post(lambda: goes_on.wait(20))
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            pieces = response.iter_text()
            first = next(pieces)
            goes_on.set()
            rest = "".join(pieces)
    assert first.count("data: ") == 1
    assert '"role":"assistant"' in first
    assert '"role"' not in rest
    assert rest.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_that_leaves_before_the_head_is_told_apart(*, has_begun: bool) -> None:
    """For the log: no status was sent."""
    sent: list[str] = []
    ended: list[bool] = []

    async def source() -> AsyncIterator[bytes]:
        if has_begun:
            yield b"data: 1\n\n"
        await asyncio.sleep(60)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    stream = EventStream(source(), {}, lambda: ended.append(True))
    if has_begun:
        asyncio.run(stream({}, receive, send))
    else:
        with pytest.raises(ClientLeftError):
            asyncio.run(stream({}, receive, send))
    assert sent == (["http.response.start", "http.response.body"] if has_begun else [])
    assert ended == [True]
