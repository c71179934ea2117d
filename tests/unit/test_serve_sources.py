"""`sources` of an answer over HTTP, and the text that their places are characters of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from star_attention.serve.keys import Keys
from tests.command_line import NEEDLE, NOISE, QUESTION
from tests.servers import ANSWER, ASK, DOCUMENT, Server, engine, in_parts, running

CHAT = "/v1/chat/completions"
CONTEXTS = "/v1/contexts"
ODD = f"Café 🦭 naïve — 海へ行く。\n{DOCUMENT}"
"""A document with characters of one to four bytes before the fact."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(engine()) as server:
        yield server


def keep(server: Server, **body: Any) -> str:
    response = server.post(f"{CONTEXTS}?wait=true", body)
    assert response.status_code in (200, 201), response.text
    id: str = response.json()["id"]
    return id


def text_of(server: Server, id: str) -> str:
    response = server.get(f"{CONTEXTS}/{id}/text")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    return response.text


def ask(server: Server, messages: Any = ASK, **fields: Any) -> httpx.Response:
    response = server.post(CHAT, {"messages": messages, "max_tokens": 24, "sources": True} | fields)
    assert response.status_code == 200, response.text
    return response


def check(sources: list[dict[str, Any]], text: str) -> None:
    """Check that places are those of the texts, and that the fact comes first."""
    assert 1 <= len(sources) <= 3
    for source in sources:
        assert text[source["start"] : source["end"]] == source["text"]
    assert ANSWER in sources[0]["text"]
    weights = [source["weight"] for source in sources]
    assert weights == sorted(weights, reverse=True)
    assert 0 < sum(weights) <= 1


def test_places_are_characters_of_the_document(server: Server) -> None:
    """Forbids places in bytes or tokens, and ones that count what a chat template wrote."""
    id = keep(server, text=ODD)
    assert text_of(server, id) == ODD
    answer = ask(server, context=id)
    assert ANSWER in answer.json()["choices"][0]["message"]["content"]
    check(answer.json()["star"]["sources"], ODD)


def test_a_stream_ends_with_its_sources(server: Server) -> None:
    id = keep(server, text=ODD)
    lines = ask(server, context=id, stream=True).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    (last,) = [chunk for chunk in chunks if "star" in chunk]
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    check(last["star"]["sources"], ODD)


def test_a_document_that_a_chat_began_with(server: Server) -> None:
    """Forbids a context that its own request can use, and nobody by its id."""
    answer = ask(server, in_parts(ODD, QUESTION))
    id = answer.headers["x-star-context"]
    assert text_of(server, id) == ODD
    check(answer.json()["star"]["sources"], ODD)
    by_id = ask(server, context=id).json()
    assert by_id["choices"][0]["message"] == answer.json()["choices"][0]["message"]
    assert by_id["usage"]["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    check(by_id["star"]["sources"], ODD)


def test_a_chat_with_more_than_a_document(server: Server) -> None:
    """The text is what the tokens write, with what is held back for the query."""
    messages = [{"role": "system", "content": "Be brief."}, *in_parts(ODD, QUESTION)]
    answer = ask(server, messages)
    text = text_of(server, answer.headers["x-star-context"])
    assert text.endswith(ODD)
    check(answer.json()["star"]["sources"], text)


def test_a_context_that_goes_on(server: Server) -> None:
    id = keep(server, text=NOISE * 8)
    body = {"text": NEEDLE + NOISE}
    longer = server.post(f"{CONTEXTS}/{id}/extend?wait=true", body).json()["id"]
    assert text_of(server, longer) == NOISE * 8 + NEEDLE + NOISE
    check(ask(server, context=longer).json()["star"]["sources"], text_of(server, longer))


def test_a_context_of_token_ids(server: Server) -> None:
    ids = engine().tokenizer(NOISE * 8 + NEEDLE + NOISE)["input_ids"]
    id = keep(server, token_ids=ids)
    assert text_of(server, id) == NOISE * 8 + NEEDLE + NOISE
    body = {"prompt": QUESTION, "context": id, "sources": 1, "max_tokens": 24}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["star"]["sources"]) == 1


def test_who_asks_for_none_gets_none(server: Server) -> None:
    id = keep(server, text=DOCUMENT)
    assert "star" not in ask(server, context=id, sources=False).json()
    # A prompt that is read as a query has no context that could be a source.
    assert ask(server, ASK).json()["star"] == {"sources": []}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": "yes"}, "sources 'yes': expected an integer"),
        ({"sources": -1}, "sources -1 is out of range; give 0 to 20"),
        ({"sources": True, "n": 2}, "sources of 2 answers is not supported; ask for a single"),
    ],
)
def test_sources_that_cannot_be_named(server: Server, fields: dict[str, Any], message: str) -> None:
    response = server.post(CHAT, {"messages": ASK} | fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "sources"


def test_texts_are_their_tenants() -> None:
    """Forbids reading another key's document by its id."""
    keys = Keys.of({"key-of-ann": "ann", "key-of-bob": "bob"})
    with running(keys=keys) as server:
        ann = {"authorization": "Bearer key-of-ann"}
        response = server.post(f"{CONTEXTS}?wait=true", {"text": DOCUMENT}, headers=ann)
        path = f"{CONTEXTS}/{response.json()['id']}/text"
        assert server.get(path, headers=ann).text == DOCUMENT
        assert server.get(path).status_code == 401
        refused = server.get(path, headers={"x-api-key": "key-of-bob"})
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "context_not_found"
