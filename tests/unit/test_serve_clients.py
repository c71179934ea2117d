"""`serve` answers OpenAI's own client over a real socket, as `generate` would."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.command_line import NEEDLE, NOISE
from tests.servers import ANSWER, ASK, DOCUMENT, NAME, QUESTION, Server, engine, in_parts, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(engine()) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def alone(messages: list[dict[str, Any]], **settings: Any) -> Any:
    """Return the answer of `generate` to the same messages."""
    star = engine()
    ids = star.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return star.generate(star.encode(ids[:1]), ids[1:], **settings)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert model.max_model_len == 65536  # type: ignore[attr-defined]
    assert client.models.retrieve(NAME) == model


def test_a_chat_equals_generate(client: openai.OpenAI) -> None:
    expected = alone(ASK, max_new_tokens=12)
    answer = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == len(expected.token_ids)
    assert usage.prompt_tokens == expected.query_tokens + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_equals_the_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = dict(model=NAME, messages=ASK, max_completion_tokens=12)
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **options
        )
    )
    first, *_, ending, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert ending.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_has_no_usage_unless_asked_for(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=NAME, messages=ASK, stream=True, max_tokens=3)
    chunks = list(stream)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_async_client_with_many_requests_at_once(server: Server) -> None:
    """Forbids that requests which share steps get each other's text or sampling."""
    settings = [dict(temperature=3.0, seed=seed) for seed in range(6)] + [dict(temperature=0)] * 2

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(options: dict[str, Any]) -> str:
                stream = await client.chat.completions.create(
                    model=NAME, messages=ASK, max_tokens=10, stream=True, **options
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*map(one, settings))

    expected = [alone(ASK, max_new_tokens=10, **options).text for options in settings]
    assert asyncio.run(ask()) == expected
    assert len(set(expected)) > 3


def test_several_answers_draw_from_seeds_that_follow(client: openai.OpenAI) -> None:
    options: dict[str, Any] = dict(model=NAME, messages=ASK, max_tokens=8, temperature=3)
    several = client.chat.completions.create(n=3, seed=5, **options)
    single = [
        client.chat.completions.create(seed=seed, **options).choices[0].message.content
        for seed in (5, 6, 7)
    ]
    assert [choice.message.content for choice in several.choices] == single
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(n=3, seed=5, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == single


def test_stops_end_an_answer_and_are_not_in_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=10)
    text = whole.choices[0].message.content
    stop = text[5:12]
    options: dict[str, Any] = dict(model=NAME, messages=ASK, max_tokens=10, stop=[stop, "zzz"])
    stopped = client.chat.completions.create(**options)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(stream=True, **options)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text[: text.index(stop)]


def test_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = dict(
        model=NAME, messages=ASK, max_tokens=4, logprobs=True, top_logprobs=2
    )
    expected = alone(ASK, max_new_tokens=4, logprobs=2)
    answer = client.chat.completions.create(**options)
    content = answer.choices[0].logprobs.content
    assert [each.token for each in content] == [each.token for each in expected.logprobs]
    assert content[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=1e-4)
    assert [len(each.top_logprobs) for each in content] == [2] * 4
    *_, ending = client.chat.completions.create(stream=True, **options)
    assert ending.choices[0].logprobs.content == content


def test_completions_take_texts_and_token_ids(client: openai.OpenAI) -> None:
    star = engine()
    prompt = f"{DOCUMENT[-300:]}<|q|>{QUESTION}<|a|>"
    ids = star.tokenizer(prompt).input_ids
    expected = star.generate(star.encode(ids[:1]), ids[1:], max_new_tokens=6).text
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=6)
    assert answer.choices[0].text == expected
    both = client.completions.create(model=NAME, prompt=[prompt, "The hill"], max_tokens=6)
    assert both.choices[0].text == expected
    assert [choice.index for choice in both.choices] == [0, 1]
    assert client.completions.create(model=NAME, prompt=ids, max_tokens=6).choices[0].text == (
        expected
    )
    chunks = client.completions.create(model=NAME, prompt=prompt, max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


@pytest.mark.parametrize("place", ["first", "last"])
def test_nothing_of_a_long_prompt_is_cut_off(client: openai.OpenAI, place: str) -> None:
    """Forbids that a prompt is shortened in silence, at either end."""
    text = NEEDLE + NOISE * 30 if place == "first" else NOISE * 30 + NEEDLE
    messages = in_parts(text, QUESTION)
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=30)
    assert ANSWER in answer.choices[0].message.content
    ids = engine().tokenizer.apply_chat_template(messages, return_dict=False)
    assert answer.usage.prompt_tokens == len(ids)


def test_answers_without_a_limit_say_whether_they_were_cut() -> None:
    """Forbids that a small default cuts answers, and that nobody can tell."""
    with running(engine(), default_max_tokens=5) as server, server.client() as client:
        cut = client.chat.completions.create(model=NAME, messages=ASK)
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)
    with running(engine()) as server, server.client() as client:
        whole = client.chat.completions.create(model=NAME, messages=ASK)
        assert whole.choices[0].finish_reason == "stop"


def test_an_answer_follows_a_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {"number": {"type": "integer"}},
        "required": ["number"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=NAME,
        messages=ASK,
        max_tokens=30,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert answer.choices[0].message.content.startswith('{"number":')
