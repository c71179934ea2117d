"""Contexts that leave a GPU for host memory, and conversations of a server, on a GPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.serve.contexts.encoder import BatchEncoder

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TEXT = "The secret number for otter is 42.\n" + "Rain falls on the hill and the dog sleeps.\n" * 400
QUERY = "What is the secret number for otter? "
LONG = (
    "Think of the rain, of the hill, of the dog that sleeps there, and of nothing else. " * 2
    + QUERY
)
ANSWER: dict[str, Any] = dict(max_new_tokens=8, ignore_eos=True, return_logits=True)


@pytest.fixture(scope="module")
def star() -> StarLLM:
    torch.backends.cuda.matmul.allow_tf32 = False
    return StarLLM.from_pretrained(MODEL, dtype="float32", block_size=512)


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
def test_a_context_leaves_the_gpu_and_comes_back(kv_dtype: str | None) -> None:
    # Not compiled: torch.compile refers to the first context that it has seen.
    own = StarLLM.from_pretrained(
        MODEL, dtype="float32", block_size=512, kv_dtype=kv_dtype, compile=False
    )
    encoder = BatchEncoder(own, own.batch)
    context = own.encode(TEXT)
    right = own.generate(context, QUERY, **ANSWER)
    gc.collect()
    before, nbytes = torch.cuda.memory_allocated(), context.nbytes
    parking = encoder.park(context)
    while not parking.done:
        parking.advance()
    parked = parking.result()
    stored = [layer.stored() for layer in parked.on_host().kv.layers if not layer.is_empty]
    assert all(tensor.is_pinned() for tensors in stored for tensor in tensors)
    assert nbytes <= parked.nbytes == encoder.host_bytes(context) < 2 * nbytes + 4096
    parking.cancel()
    del context
    gc.collect()
    assert torch.cuda.memory_allocated() <= before - nbytes
    coming = encoder.bring_back(parked)
    while not coming.done:
        coming.advance()
    reply = own.generate(coming.result(), QUERY, **ANSWER)
    assert reply.token_ids == right.token_ids
    assert torch.equal(reply.logits, right.logits)


def test_a_server_moves_contexts_and_goes_on_with_conversations(star: StarLLM) -> None:
    pytest.importorskip("starlette")
    from tests.servers import running

    texts = [f"Number {number}. {TEXT}" for number in range(3)]
    room = int(1.3 * star.context_bytes(len(star.tokenizer(TEXT).input_ids)))
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": t} for t in (text, LONG)]}]
        for text in texts
    ]
    with running(star, max_context_bytes=room, max_host_bytes=2**30) as server:
        answers = []
        for turn in range(2):
            for number, messages in enumerate(chats):
                body = {"messages": messages, "max_tokens": 24}
                response = server.post("/v1/chat/completions", body)
                assert response.headers["x-star-cache"] == ("hit" if turn else "miss")
                text = response.json()["choices"][0]["message"]["content"]
                answers.append(text)
                if turn:
                    assert response.headers["x-star-rule"] == "conversation"
                question = {"role": "user", "content": "And the dog?"}
                chats[number] = [*messages, {"role": "assistant", "content": text}, question]
        assert server.metric("contexts", location="host") == 2
        assert server.metric("context_returns_total") == 3
        assert server.metric("encodes_total", outcome="done") == 3
    # The same from a server with room for all of them, and with no conversations.
    with running(star, max_conversations=0) as server:
        for messages, answer in zip(chats, answers[3:], strict=True):
            body = {"messages": messages[:-2], "max_tokens": 24}
            response = server.post("/v1/chat/completions", body)
            assert response.json()["choices"][0]["message"]["content"] == answer
