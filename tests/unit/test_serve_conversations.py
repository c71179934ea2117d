"""A chat that goes on computes only what is new, and gets the answers that it would get anyway."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

from star_attention import StarLLM
from star_attention.serve.keys import Keys
from tests.command_line import NEEDLE, NOISE
from tests.engines import bundled_model, bundled_tokenizer
from tests.servers import DOCUMENT, NAME, QUESTION, Server, engine, eventually, running

CHAT = "/v1/chat/completions"
SHORT = f"{NEEDLE} Keep the number in mind, and the door shut, while the tide comes in. "
"""A prompt of so few tokens that none of it becomes a context."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(engine()) as own:
        yield own


def asking(document: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text} for text in (document, QUESTION)]
    return [{"role": "user", "content": parts}]


def answered(messages: list[dict[str, Any]], answer: str, question: str) -> list[dict[str, Any]]:
    """Return the messages of the next turn."""
    return [
        *messages,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]


def post(server: Server, messages: list[dict[str, Any]], **fields: Any) -> Any:
    headers = fields.pop("headers", None)
    body = {"messages": messages, "max_tokens": 24, "logprobs": True, **fields}
    response = server.post(CHAT, body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def text_of(response: Any) -> str:
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def alone(star: StarLLM, messages: list[dict[str, Any]], context_tokens: int) -> Any:
    """Return the answer of `generate` to the same messages, cut at the same place."""
    ids = prompt_ids(star, messages)
    context = star.encode(ids[:context_tokens], progress=False)
    return star.generate(context, ids[context_tokens:], max_new_tokens=24, logprobs=0)


def prompt_ids(star: StarLLM, messages: list[dict[str, Any]]) -> list[int]:
    ids: list[int] = star.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return ids


def shared(first: list[int], second: list[int]) -> int:
    """Return the number of ids that two lists begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def check_equal(response: Any, star: StarLLM, messages: list[dict[str, Any]]) -> Any:
    """Check an answer against one for which nothing was kept, and return that."""
    right = alone(star, messages, int(response.headers["x-star-context-tokens"]))
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] == right.text
    logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
    assert logprobs == pytest.approx([each.logprob for each in right.logprobs], abs=1e-4)
    return right


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(DOCUMENT, id="context", marks=pytest.mark.slow),
        pytest.param(SHORT, id="query"),
    ],
)
def test_each_turn_computes_what_is_new(server: Server, document: str) -> None:
    """Forbids reading a whole conversation again with every message of it."""
    messages = asking(document)
    known: list[int] = []
    last_tokens = 0
    for question in ("What is the hill like?", "And the tide?", None):
        before = {
            name: server.metric(f"{name}_total")
            for name in ("prompt_tokens", "prefix_cache_hits", "conversation_tokens")
        }
        response = post(server, messages)
        right = check_equal(response, engine(), messages)
        ids = prompt_ids(engine(), messages)
        usage = response.json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        after = {name: server.metric(f"{name}_total") - value for name, value in before.items()}
        assert after["prompt_tokens"] == usage["prompt_tokens"]
        assert after["prefix_cache_hits"] == cached
        context = int(response.headers["x-star-context-tokens"])
        if known:
            assert response.headers["x-star-rule"] == "conversation"
            assert response.headers["x-star-cache"] == "hit"
            assert cached == shared(ids, known) >= last_tokens
            assert int(response.headers["x-star-conversation-tokens"]) == cached - context
            assert after["conversation_tokens"] == cached - context
        # The last token of an answer has not been through the model.
        known, last_tokens = ids + right.token_ids[:-1], len(ids)
        if question is not None:
            messages = answered(messages, text_of(response), question)


def test_openai_s_client_goes_on_in_streams(server: Server) -> None:
    messages = asking("It begins. " + DOCUMENT)
    cached = []
    with server.client() as client:
        for question in ("What is the hill like?", "And the tide?", "Why?"):
            stream = client.chat.completions.create(
                model=NAME,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            answer = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            usage = chunks[-1].usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            cached.append((usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens))
            messages = answered(messages, answer, question)
    assert cached[0][0] == 0
    # A question of a few tokens, and the end of the answer before it.
    assert all(0 < prompt - known < 16 for known, prompt in cached[1:])


@pytest.mark.parametrize(
    "change",
    ["edited", *(pytest.param(each, marks=pytest.mark.slow) for each in ("cut", "undone"))],
)
def test_what_a_client_changes_is_computed(server: Server, change: str) -> None:
    """Forbids an answer from keys and values of other words than the prompt has."""
    messages = asking(f"{SHORT} It was {change}. ")
    first = post(server, messages)
    later = answered(messages, text_of(first), "What is the hill like?")
    second = post(server, later)
    if change == "cut":
        changed = answered(messages, text_of(first)[:12], "What is the hill like?")
    elif change == "edited":
        changed = answered(messages, "No. " + text_of(first), "What is the hill like?")
    else:
        changed = answered(messages, text_of(first), "What is the tide like?")
    third = post(server, changed)
    assert third.headers["x-star-rule"] == "conversation"
    kept = int(third.headers["x-star-conversation-tokens"])
    assert 0 < kept < second.json()["usage"]["prompt_tokens"]
    check_equal(third, engine(), changed)


def test_a_template_that_drops_the_start_of_an_answer() -> None:
    """Forbids losing all turns where thoughts, or what they begin with, are left out later."""
    tokenizer = copy.deepcopy(bundled_tokenizer())
    tokenizer.chat_template += "{% if add_generation_prompt %}So, in a word: {% endif %}"
    star = StarLLM(bundled_model(), tokenizer, block_size=256, anchor_size=256)
    with running(star) as server:
        messages = asking(SHORT)
        first = post(server, messages)
        messages = answered(messages, text_of(first), "What is the hill like?")
        second = post(server, messages)
        assert second.headers["x-star-rule"] == "conversation"
        assert int(second.headers["x-star-conversation-tokens"]) > 30
        check_equal(second, star, messages)


def test_questions_on_a_context_go_on(server: Server) -> None:
    response = server.post("/v1/contexts?wait=true", {"text": DOCUMENT, "name": "book"})
    context = response.json()["id"]
    messages = [{"role": "user", "content": f"{SHORT} {QUESTION}"}]
    first = post(server, messages, context=context)
    messages = answered(messages, text_of(first), "What is the hill like?")
    second = post(server, messages, context=context)
    assert second.headers["x-star-rule"] == "context"
    assert int(second.headers["x-star-conversation-tokens"]) > 30
    # It goes with the context, and is no part of another one.
    server.client().delete(f"/contexts/{context}", cast_to=object)
    new = server.post("/v1/contexts?wait=true", {"text": DOCUMENT}).json()["id"]
    third = post(server, messages, context=new)
    assert "x-star-conversation-tokens" not in third.headers
    assert text_of(third) == text_of(second)


@pytest.mark.slow
def test_an_answer_that_was_stopped_goes_on(server: Server) -> None:
    """Forbids computing a prompt again whose answer its client has cut short."""
    messages = asking(f"{SHORT} Stop me. ")
    before, _, _ = server.service.store.talks.numbers()
    with server.client() as client:
        stream = client.chat.completions.create(
            model=NAME,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if len(text) > 40:
                break
        stream.close()
    assert eventually(lambda: server.service.store.talks.numbers()[0] > before)
    messages = answered(messages, text, "What is the hill like?")
    second = post(server, messages)
    assert second.headers["x-star-rule"] == "conversation"
    check_equal(second, engine(), messages)


@pytest.mark.slow
def test_texts_and_token_ids_go_on(server: Server) -> None:
    prompt = f"{NOISE}\n{SHORT}\n{QUESTION}"
    body = {"prompt": prompt, "max_tokens": 12}
    first = server.post("/v1/completions", body)
    longer = prompt + first.json()["choices"][0]["text"] + "\nAnd the tide?"
    second = server.post("/v1/completions", {"prompt": longer, "max_tokens": 12})
    assert second.headers["x-star-rule"] == "conversation"
    ids = engine().tokenizer(longer).input_ids
    third = server.post("/v1/completions", {"prompt": ids, "max_tokens": 12})
    assert third.headers["x-star-rule"] == "conversation"
    text = third.json()["choices"][0]["text"]
    assert text == second.json()["choices"][0]["text"]
    cut = int(second.headers["x-star-context-tokens"])
    context = engine().encode(ids[:cut], progress=False)
    assert engine().generate(context, ids[cut:], max_new_tokens=12).text == text


def test_nobody_else_goes_on_with_it() -> None:
    """Forbids that the speed of an answer tells what another key, or another salt, has said."""
    names = ("ann", "bob")
    keys = Keys([(hashlib.sha256(f"key-of-{name}".encode()).digest(), name) for name in names])
    with running(keys=keys) as server:
        messages = asking(SHORT)
        ann, bob = ({"authorization": f"Bearer key-of-{name}"} for name in names)
        first = post(server, messages, headers=ann)
        messages = answered(messages, text_of(first), "What is the hill like?")
        for other in ({"headers": bob}, {"headers": ann, "cache_salt": "x"}):
            response = post(server, messages, **other)
            assert response.headers["x-star-rule"] == "none"
            assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert post(server, messages, headers=ann).headers["x-star-rule"] == "conversation"


@pytest.mark.slow
def test_it_can_be_switched_off(server: Server) -> None:
    explicit = {"prompt_cache_options": {"mode": "explicit"}}
    messages = asking(f"{SHORT} Say nothing of it. ")
    first = post(server, messages, **explicit)
    later = answered(messages, text_of(first), "What is the hill like?")
    assert post(server, later, **explicit).headers["x-star-rule"] == "none"
    with running(engine(), max_conversations=0) as other:
        post(other, messages)
        assert other.service.store.talks.numbers()[0] == 0


@pytest.mark.slow
def test_without_implicit_cuts_only_the_same_cut_goes_on() -> None:
    """Forbids that `--no-implicit` lets the server's state decide what is computed."""
    with running(engine(), implicit=False) as server:
        messages = asking(SHORT)
        first = post(server, messages)
        messages = answered(messages, text_of(first), "What is the hill like?")
        second = post(server, messages)
        assert second.headers["x-star-rule"] == "none"
        assert int(second.headers["x-star-conversation-tokens"]) > 30
        check_equal(second, engine(), messages)


def test_a_context_that_a_request_has_made_can_be_named(server: Server) -> None:
    """Forbids that messages cannot follow a document because somebody has asked about it before."""
    document = "It is about the sea. " + DOCUMENT
    first = post(server, asking(document))
    made = server.post("/v1/contexts?wait=true", {"text": document})
    assert made.json()["id"] == first.headers["x-star-context"]
    again = post(server, [{"role": "user", "content": QUESTION}], context=made.json()["id"])
    assert text_of(again) == text_of(first)
