"""Sampling, log probabilities, JSON and asyncio on a GPU, with graphs and without."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM, phase2
from star_attention.generation import requests
from star_attention.hf.execution import processing
from star_attention.hf.execution.sampling import Sampler

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TEXT = "The secret number for otter is 42.\n" + "Rain falls on the hill and the dog sleeps.\n" * 90
QUESTION = [{"role": "user", "content": "What is the secret number for otter?"}]
OTHER = [{"role": "user", "content": "Who sleeps?"}]
SAMPLING: dict[str, Any] = dict(temperature=2.0, seed=5, max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def star(request: pytest.FixtureRequest) -> StarLLM:
    torch.backends.cuda.matmul.allow_tf32 = False
    return StarLLM.from_pretrained(MODEL, compile=request.param, dtype="float32", block_size=512)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode([{"role": "user", "content": TEXT}])
    return context


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(
    star: StarLLM, context: EncodedContext
) -> None:
    alone = [star.generate(context, query, **SAMPLING).token_ids for query in (QUESTION, OTHER)]
    batch = star.generate(context, [OTHER, QUESTION, OTHER], **SAMPLING)
    assert [reply.token_ids for reply in batch] == [alone[1], alone[0], alone[1]]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("seed", [None, 1])
def test_drawing_does_not_wait_for_the_device(queries: int, seed: int | None) -> None:
    scores_RV = torch.randn(6, 32000, device="cuda")
    sampler = Sampler(seed, queries, scores_RV.device)
    sampler.draw(scores_RV)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens_R1 = sampler.draw(scores_RV)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens_R1.shape == (6, 1)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("settings", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_a_further_first_token_does_not_wait_for_the_device(
    star: StarLLM, context: EncodedContext, settings: dict[str, Any]
) -> None:
    """transformers prepared each answer anew, and asked the device for values meanwhile."""
    if star.runtime.handle.graphs is None:
        pytest.skip("transformers' own forwards may wait")
    options = settings | {"max_new_tokens": 1}
    expected = star.generate(context, QUESTION, **options).token_ids
    prepared = requests.prepared(star.runtime, context, QUESTION, options)
    assert prepared.settings is not None
    request = requests.for_answers(star.runtime, context, prepared.prompts, prepared.settings)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        leader = phase2.Leader(request, request.program(1), processing.of(request))
        step = leader.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.tokens == expected


def test_log_probabilities_are_those_of_the_logits(star: StarLLM, context: EncodedContext) -> None:
    for reply in star.generate(
        context, [QUESTION, OTHER], logprobs=2, return_logits=True, **SAMPLING
    ):
        expected_TV = torch.log_softmax(reply.logits, -1)
        for token, expected_V in zip(reply.logprobs, expected_TV, strict=True):
            assert token.logprob == pytest.approx(float(expected_V[token.id]), abs=1e-4)
            assert token.top[0].logprob == pytest.approx(float(expected_V.max()), abs=1e-4)


# With limits: the model may add digit to digit.
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMA = {"type": "object", "properties": {"n": NUMBER}, "required": ["n"]}


def test_an_answer_follows_a_schema(star: StarLLM, context: EncodedContext) -> None:
    """Rows of a batch end at different steps; each has a mask of its own on the device."""
    pytest.importorskip("xgrammar")
    options: dict[str, Any] = dict(json_schema=SCHEMA, max_new_tokens=60)
    replies = star.generate(context, [QUESTION, OTHER], **options)
    assert json.loads(replies[0].text) == {"n": 42}
    assert isinstance(json.loads(replies[1].text)["n"], int)
    for query, reply in zip([QUESTION, OTHER], replies, strict=True):
        assert "".join(star.stream(context, query, **options)) == reply.text


def test_sampled_answers_follow_a_schema(star: StarLLM, context: EncodedContext) -> None:
    pytest.importorskip("xgrammar")
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 6}
    options: dict[str, Any] = dict(json_schema=schema, max_new_tokens=60, temperature=3.0, seed=2)
    replies = star.generate(context, QUESTION, num_return_sequences=8, **options)
    values = [json.loads(reply.text) for reply in replies]
    assert all(isinstance(item, bool) for value in values for item in value)
    assert len({len(value) for value in values}) > 1


def test_a_schema_gives_the_answers_of_the_cpu(star: StarLLM, context: EncodedContext) -> None:
    pytest.importorskip("xgrammar")
    solo = StarLLM.from_pretrained(MODEL, device="cpu", dtype="float32", block_size=512)
    expected = solo.generate(
        solo.encode([{"role": "user", "content": TEXT}]), QUESTION, json_schema=SCHEMA
    )
    assert star.generate(context, QUESTION, json_schema=SCHEMA).token_ids == expected.token_ids


def test_awaited_answers_are_those_of_generate(star: StarLLM, context: EncodedContext) -> None:
    expected = star.generate(context, QUESTION, **SAMPLING).text

    async def read() -> str:
        return "".join([piece async for piece in star.astream(context, QUESTION, **SAMPLING)])

    async def main() -> list[Any]:
        encoded = await star.aencode([{"role": "user", "content": TEXT}])
        return await asyncio.gather(read(), star.agenerate(encoded, QUESTION, **SAMPLING), read())

    first, reply, third = asyncio.run(main())
    assert [first, reply.text, third] == [expected] * 3
