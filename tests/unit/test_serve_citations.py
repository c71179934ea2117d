"""Sources of an answer as the citations of `/v1/responses` and of `/v1/messages`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.command_line import NOISE, OTHER, QUESTION
from tests.servers import ANSWER, DOCUMENT, NAME, Server, engine, events_of, running

MESSAGES = "/v1/messages"
ODD = f"Café 🦭 naïve — 海へ行く。\n{DOCUMENT}"
FIRST = NOISE * 4 + OTHER
"""A document before the one that has the answer."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(engine()) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def upload(client: openai.OpenAI, name: str, text: str) -> str:
    return client.files.create(file=(name, text.encode()), purpose="user_data").id


def request(*parts: dict[str, Any]) -> dict[str, Any]:
    """Return keywords for a question about files."""
    question = {"type": "input_text", "text": QUESTION}
    return {
        "model": NAME,
        "input": [{"role": "user", "content": [*parts, question]}],
        "max_output_tokens": 24,
        "extra_body": {"sources": True},
    }


def check_places(places: list[tuple[int, int, str]], text: str) -> None:
    """Check that places are those of their texts, and that the first one has the answer."""
    assert places
    for start, end, cited in places:
        assert text[start:end] == cited
    assert ANSWER in places[0][2]


def check_annotations(annotations: list[Any], id: str, name: str) -> None:
    for each in annotations:
        assert (each.type, each.file_id, each.filename, each.index) == (
            "file_citation",
            id,
            name,
            0,
        )
    places = [each.star["document"] for each in annotations]
    texts = [each.star["text"] for each in annotations]
    check_places(
        [(place["start"], place["end"], text) for place, text in zip(places, texts, strict=True)],
        ODD,
    )


def test_a_response_cites_its_file(client: openai.OpenAI) -> None:
    """OpenAI's client reads the annotations, which name the file that it has uploaded."""
    id = upload(client, "book.txt", ODD)
    answer = client.responses.create(**request({"type": "input_file", "file_id": id}))
    (part,) = answer.output[0].content  # type: ignore[union-attr]
    assert ANSWER in answer.output_text
    check_annotations(part.annotations, id, "book.txt")  # type: ignore[union-attr]
    kept = client.responses.retrieve(answer.id)
    assert kept.output[0].content == answer.output[0].content  # type: ignore[union-attr]
    # What came back is given back, as clients without a server's memory do.
    again = client.responses.create(
        model=NAME,
        input=[
            *request()["input"],
            answer.output[0].model_dump(),
            {"role": "user", "content": "?"},
        ],
        max_output_tokens=2,
    )
    assert again.status == "incomplete"


def test_a_streamed_response_cites_its_file(client: openai.OpenAI) -> None:
    id = upload(client, "book.txt", ODD)
    with client.responses.stream(**request({"type": "input_file", "file_id": id})) as stream:
        events = list(stream)
        answer = stream.get_final_response()
    added = [each for each in events if each.type == "response.output_text.annotation.added"]
    annotations = answer.output[0].content[0].annotations  # type: ignore[union-attr]
    assert [each.annotation_index for each in added] == list(range(len(annotations)))
    sent = [dict(each.annotation) for each in added]
    assert sent == [each.model_dump() for each in annotations]
    check_annotations(annotations, id, "book.txt")


def test_a_context_is_cited_by_its_own_id(server: Server, client: openai.OpenAI) -> None:
    made = server.post("/v1/contexts?wait=true", {"text": ODD, "name": "a book"}).json()
    asked = request() | {"extra_body": {"sources": 1, "context": made["id"]}}
    answer = client.responses.create(**asked)
    (annotation,) = answer.output[0].content[0].annotations  # type: ignore[union-attr]
    check_annotations([annotation], made["id"], "a book")
    assert answer.star["context"] == made["id"]  # type: ignore[attr-defined]


def document(text: str, title: str | None = None, **fields: Any) -> dict[str, Any]:
    source = {"type": "text", "media_type": "text/plain", "data": text}
    about = {} if title is None else {"title": title}
    return {"type": "document", "source": source, **about, **fields}


def ask(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    question = {"type": "text", "text": QUESTION}
    messages = [{"role": "user", "content": [*parts, question]}]
    return {"model": NAME, "max_tokens": 24, "messages": messages} | fields


CITED = {"citations": {"enabled": True}}


def check_citations(citations: list[dict[str, Any]]) -> None:
    assert all(each["type"] == "char_location" for each in citations)
    about = {"document_index": 1, "document_title": "The second", "file_id": None}
    of_second = [each for each in citations if each["document_index"] == 1]
    for each in of_second:
        assert {name: each[name] for name in about} == about
    assert citations[0] in of_second
    check_places(
        [(c["start_char_index"], c["end_char_index"], c["cited_text"]) for c in of_second], ODD
    )


def test_a_message_cites_characters_of_its_documents(server: Server) -> None:
    """Forbids places in the whole prompt, where titles and other documents count."""
    parts = document(FIRST, "The first", **CITED), document(ODD, "The second", **CITED)
    response = server.post(MESSAGES, ask(*parts))
    assert response.status_code == 200, response.text
    (block,) = response.json()["content"]
    assert ANSWER in block["text"]
    check_citations(block["citations"])
    events = events_of(server.post(MESSAGES, ask(*parts, stream=True)))
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    cited = [each for each in deltas if each["delta"]["type"] == "citations_delta"]
    assert [each["delta"]["citation"] for each in cited] == block["citations"]
    assert deltas[-len(cited) :] == cited
    # What came back is given back.
    messages = [{"role": "assistant", "content": [block]}, {"role": "user", "content": "?"}]
    again = ask(*parts)
    again["messages"] += messages
    assert server.post(MESSAGES, again).status_code == 200


def test_who_wants_no_citations_gets_none(server: Server) -> None:
    for wanted in ({}, {"citations": {"enabled": False}}, {"citations": None}):
        answer = server.post(MESSAGES, ask(document(ODD, **wanted))).json()
        assert "star" not in answer
        assert answer["content"][0]["citations"] is None
    # No document is named in such a prompt; the sources are in a field of their own.
    mark = {"type": "text", "text": ODD, "cache_control": {"type": "ephemeral"}}
    answer = server.post(MESSAGES, ask(mark, sources=True)).json()
    assert answer["content"][0]["citations"] is None
    assert ANSWER in answer["star"]["sources"][0]["text"]
