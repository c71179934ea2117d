"""Conversations on a GPU: a next turn by CUDA graphs over a kept tail, and eagerly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TEXT = "The secret number for otter is 42.\n" + "Rain falls on the hill and the dog sleeps.\n" * 90
QUERIES = ["What is the secret number for otter?", "Who sleeps?", "A", "Where does rain fall? " * 9]
ANSWER: dict[str, Any] = dict(max_new_tokens=8, ignore_eos=True, return_logits=True)


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def star(request: pytest.FixtureRequest) -> StarLLM:
    torch.backends.cuda.matmul.allow_tf32 = False
    return StarLLM.from_pretrained(MODEL, compile=request.param, dtype="float32", block_size=512)


@pytest.fixture(scope="module", params=[None, "fp8"])
def context(star: StarLLM, request: pytest.FixtureRequest) -> EncodedContext:
    context: EncodedContext = star.with_config(kv_dtype=request.param).encode(
        [{"role": "user", "content": TEXT}]
    )
    return context


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_ten_turns_equal_the_same_messages_as_one_query(
    star: StarLLM, context: EncodedContext
) -> None:
    reply: Any = context
    said: list[dict[str, str]] = []
    for turn in range(10):
        query = QUERIES[turn % len(QUERIES)]
        reply = star.generate(reply, query, keep=True, **ANSWER)
        said.append(message("user", query))
        whole = star.generate(context, said, **ANSWER)
        assert reply.token_ids == whole.token_ids
        torch.testing.assert_close(reply.logits, whole.logits, atol=1e-2, rtol=1e-3)
        assert reply.query_tokens == whole.query_tokens
        said.append(message("assistant", reply.text))
    # A graph takes its query in place of padding, and the rest is kept.
    assert reply.kept_tokens > reply.query_tokens - 256
    graphs = star.runtime.handle.graphs
    if graphs is not None:
        assert any(key[1] > 1 and done for key, done in graphs.captured.items())


def test_branches_and_undo(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(context, QUERIES[0], keep=True, **ANSWER)
    one = first.continue_with(QUERIES[1], **ANSWER)
    other = first.continue_with(QUERIES[3], **ANSWER)
    again = first.continue_with(QUERIES[1], **ANSWER)
    undone = star.generate(other.conversation.undo(), QUERIES[1], **ANSWER)
    assert one.token_ids == again.token_ids == undone.token_ids
    batch = star.generate(context, QUERIES, keep=True, **ANSWER)
    for reply, query in zip(batch, QUERIES, strict=True):
        alone = star.generate(context, query, keep=True, **ANSWER)
        assert reply.token_ids == alone.token_ids
        following = reply.continue_with("Who sleeps?", **ANSWER)
        assert following.token_ids == alone.continue_with("Who sleeps?", **ANSWER).token_ids


def test_a_next_turn_over_tails_that_grew(star: StarLLM, context: EncodedContext) -> None:
    """Buffers move while an answer is written, and graphs read their addresses from tables."""
    long: dict[str, Any] = ANSWER | dict(max_new_tokens=150)
    first = star.generate(context, QUERIES[0], keep=True, **long)
    second = first.continue_with("Who sleeps?", **long)
    talk = [
        message("user", QUERIES[0]),
        message("assistant", first.text),
        message("user", "Who sleeps?"),
    ]
    assert second.token_ids == star.generate(context, talk, **long).token_ids
    stream = star.stream(first, "Who sleeps?", **long)
    next(stream)
    between = first.continue_with("A", **ANSWER)
    assert between.token_ids == first.continue_with("A", **ANSWER).token_ids
    list(stream)
    assert stream.result.token_ids == second.token_ids
