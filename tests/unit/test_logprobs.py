"""Log probabilities of an answer's tokens are the model's own, before any processing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from tests.engines import bundled_tokenizer, text_model
from tests.spelling import CONTEXT, QUERY, ids_of, spell


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=16)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode(CONTEXT)
    return context


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(do_sample=True, seed=1, temperature=2.0, top_k=50),
        dict(repetition_penalty=1.5),
        dict(do_sample=True, seed=1, num_return_sequences=2),
    ],
    ids=["greedy", "sampling", "penalty", "several answers"],
)
def test_they_are_those_of_the_logits(
    star: StarLLM, context: EncodedContext, options: dict[str, Any]
) -> None:
    """For answers that end one after another, too."""
    queries = [QUERY, "<|q|>Stars?<|a|>"]
    replies = star.generate(
        context, queries, max_new_tokens=6, logprobs=5, return_logits=True, **options
    )
    flat = [reply for part in replies for reply in (part if isinstance(part, list) else [part])]
    for reply in flat:
        expected_TV = torch.log_softmax(reply.logits, -1)
        assert [token.id for token in reply.logprobs] == reply.token_ids
        for token, expected_V in zip(reply.logprobs, expected_TV, strict=True):
            assert token.logprob == pytest.approx(float(expected_V[token.id]), abs=1e-5)
            assert token.token == star.tokenizer.decode([token.id])
            values, ids = expected_V.topk(5)
            assert [other.id for other in token.top] == ids.tolist()
            assert [other.logprob for other in token.top] == pytest.approx(
                values.tolist(), abs=1e-5
            )
            assert all(other.top == [] for other in token.top)


def test_rows_that_end_have_no_more_than_their_tokens(
    star: StarLLM, context: EncodedContext
) -> None:
    texts = ["The number", "The secret number is 7"]
    replies = star.generate(
        context, [QUERY] * 2, max_new_tokens=30, logprobs=0, **spell(context, *texts, then="<eos>")
    )
    for reply, text in zip(replies, texts, strict=True):
        assert [token.id for token in reply.logprobs] == [*ids_of(text), 2]
        assert all(token.top == [] and token.logprob < 0 for token in reply.logprobs)
        assert reply.as_dict()["logprobs"][-1]["token"] == "<eos>"


def test_a_stream_and_ids_alone_have_them(star: StarLLM, context: EncodedContext) -> None:
    with star.stream(context, QUERY, max_new_tokens=4, ignore_eos=True, logprobs=1) as stream:
        pass
    assert stream.result.logprobs == []
    with star.stream(context, QUERY, max_new_tokens=4, ignore_eos=True, logprobs=1) as stream:
        list(stream)
    assert len(stream.result.logprobs or []) == 4
    bare = StarLLM(star.model, block_size=16)
    [token] = bare.generate(bare.encode([5, 6]), [7], max_new_tokens=1, logprobs=1).logprobs
    assert token.token == ""
    assert token.top[0].id == token.id
    assert bare.generate(bare.encode([5, 6]), [7], max_new_tokens=1).logprobs is None


@pytest.mark.parametrize("count", [-1, True, 2.0, "5", 10**6])
def test_a_number_that_cannot_work_is_refused(
    star: StarLLM, context: EncodedContext, count: Any
) -> None:
    with pytest.raises(InvalidInputError, match=r"logprobs: expected the number of most"):
        star.generate(context, QUERY, logprobs=count)


def test_beams_have_none(star: StarLLM, context: EncodedContext) -> None:
    with pytest.raises(InvalidInputError, match="logprobs works with greedy search and sampling"):
        star.generate(context, QUERY, num_beams=2, logprobs=1)
