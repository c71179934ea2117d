"""`/v1/contexts`: documents that are kept, found again, asked, and dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from star_attention.serve.keys import Keys
from tests.servers import (
    ANSWER,
    ASK,
    DOCUMENT,
    QUESTION,
    Server,
    engine,
    eventually,
    in_parts,
    running,
)

CHAT = "/v1/chat/completions"
CONTEXTS = "/v1/contexts"


@pytest.fixture
def server() -> Iterator[Server]:
    with running(engine()) as server:
        yield server


@pytest.fixture
def quick() -> Iterator[Server]:
    """A server whose answers are nonsense."""
    with running() as server:
        yield server


def create(server: Server, **body: Any) -> dict[str, Any]:
    response = server.post(f"{CONTEXTS}?wait=true", body)
    assert response.status_code in (200, 201), response.text
    context: dict[str, Any] = response.json()
    assert context["status"] == "ready"
    return context


def ask(server: Server, messages: list[dict[str, Any]], **fields: Any) -> httpx.Response:
    response = server.post(CHAT, {"messages": messages, "max_tokens": 24} | fields)
    assert response.status_code == 200, response.text
    return response


def text_of(response: httpx.Response) -> str:
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_a_context_from_its_beginning_to_its_end(server: Server) -> None:
    context = create(server, text=DOCUMENT, name="report", ttl=3600)
    assert context["object"] == "context"
    assert context["id"].startswith("ctx_")
    assert context["name"] == "report"
    assert context["location"] == "device"
    assert context["progress"] == {"done": context["tokens"], "total": context["tokens"]}
    assert context["expires_at"] == pytest.approx(context["last_used_at"] + 3600, abs=1)
    path = f"{CONTEXTS}/{context['id']}"
    answer = ask(server, ASK, context=context["id"])
    assert ANSWER in text_of(answer)
    assert answer.headers["x-star-cache"] == "hit"
    assert answer.headers["x-star-rule"] == "context"
    assert answer.headers["x-star-context"] == context["id"]
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == context["tokens"]
    assert server.get(path).json()["hits"] == 1
    changed = server.post(path, {"ttl": None, "pin": True, "name": "other"}).json()
    assert (changed["expires_at"], changed["pinned"], changed["name"]) == (None, True, "other")
    listed = server.get(CONTEXTS).json()
    assert [each["id"] for each in listed["data"]] == [context["id"]]
    assert (listed["object"], listed["has_more"]) == ("list", False)
    gone = httpx.delete(f"{server.url}{path}").json()
    assert gone == {"id": context["id"], "object": "context.deleted", "deleted": True}
    assert server.get(path).status_code == 404
    missing = server.post(CHAT, {"messages": ASK, "context": context["id"]})
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "context_not_found"
    assert server.get(CONTEXTS).json()["data"] == []


def test_the_same_document_is_the_same_context(quick: Server) -> None:
    first = quick.post(CONTEXTS, {"text": DOCUMENT})
    assert first.status_code == 202
    again = create(quick, text=DOCUMENT)
    assert again["id"] == first.json()["id"]
    other = create(quick, text=DOCUMENT, cache_salt="mine")
    assert other["id"] != again["id"]


def test_a_context_of_a_request_can_be_named_once_it_is_created(tmp_path: Path) -> None:
    """Forbids that messages cannot follow a document, because a chat has brought it before."""
    store = str(tmp_path / "store")
    with running(engine(), store=store) as server:
        before = ask(server, in_parts(DOCUMENT, QUESTION, mark=True)).headers["x-star-context"]
        id = create(server, text=DOCUMENT)["id"]
        assert id == before
        answer = text_of(ask(server, ASK, context=id))
        assert ANSWER in answer
    with running(engine(), store=store) as server:
        assert text_of(ask(server, ASK, context=id)) == answer
        assert server.metric("encodes_total", outcome="done") == 0


def test_twenty_questions_encode_once(server: Server) -> None:
    """Forbids a full prefill for each question on one document, and other answers on a hit."""
    miss = ask(server, in_parts(DOCUMENT, QUESTION))
    assert miss.headers["x-star-cache"] == "miss"
    assert miss.headers["x-star-miss-reason"] == "new"
    usage = miss.json()["usage"]
    tokens = int(miss.headers["x-star-context-tokens"])
    assert usage["prompt_tokens_details"]["cache_write_tokens"] == tokens > 300
    for _ in range(2):
        hit = ask(server, in_parts(DOCUMENT, QUESTION))
        assert hit.headers["x-star-cache"] == "hit"
        assert hit.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens
        assert text_of(hit) == text_of(miss)
    ask(server, in_parts(DOCUMENT, "What else?"))
    assert server.metric("encodes_total", outcome="done") == 1
    assert server.metric("prefix_cache_queries_total") == 4 * tokens
    assert server.metric("prefix_cache_hits_total") == 3 * tokens


def test_a_client_that_leaves_and_comes_back() -> None:
    """Forbids a second encode for a client that gave up waiting for the first one."""
    body = {"messages": in_parts(DOCUMENT * 15, QUESTION, mark=True), "max_tokens": 2}
    with running() as server:
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: {len(data)}\n\n"
        with server.raw(head, data):
            assert eventually(lambda: server.service.engine.waiting == 1)
        answer = server.post(CHAT, body)
        assert answer.headers["x-star-cache"] in ("joined", "hit")
        assert server.metric("encodes_total", outcome="done") == 1
        assert server.metric("encodes_total", outcome="canceled") == 0


def test_a_context_that_is_deleted_before_it_is_there() -> None:
    """Forbids an error for who did not name it; who did, learns that it is gone."""
    document = DOCUMENT * 15
    with running() as server, ThreadPoolExecutor(2) as clients:
        context = server.post(CONTEXTS, {"text": document}).json()
        named = {"messages": ASK, "context": context["id"], "max_tokens": 2}
        marked = {"messages": in_parts(document, QUESTION, mark=True), "max_tokens": 2}
        answers = [clients.submit(server.post, CHAT, body) for body in (named, marked)]
        assert eventually(lambda: server.service.engine.waiting == 2)
        assert httpx.delete(f"{server.url}{CONTEXTS}/{context['id']}").status_code == 200
        gone, answer = (each.result() for each in answers)
        assert gone.status_code == 409
        assert gone.json()["error"]["code"] == "context_deleted"
        assert answer.status_code == 200
        assert eventually(server.is_idle)


@pytest.mark.parametrize("stream", [True, False])
def test_a_context_that_is_deleted_while_its_client_waits(stream: bool) -> None:
    """Forbids a stream that breaks off, and the words for a context that never was."""
    headers = {"accept": "text/event-stream"} if stream else {}
    body = {"text": DOCUMENT * 15}
    with running() as server, ThreadPoolExecutor(1) as client:
        made = client.submit(server.post, f"{CONTEXTS}?wait=true", body, headers=headers)
        assert eventually(lambda: bool(server.get(CONTEXTS).json()["data"]))
        (context,) = server.get(CONTEXTS).json()["data"]
        assert context["status"] in ("queued", "encoding")
        httpx.delete(f"{server.url}{CONTEXTS}/{context['id']}")
        response = made.result()
        if stream:
            *_, error, done = [line for line in response.text.split("\n\n") if line]
            assert done == "data: [DONE]"
            gone = json.loads(error.removeprefix("data: "))
        else:
            assert response.status_code == 409
            gone = response.json()
        assert gone["error"]["code"] == "context_deleted"


def test_many_who_ask_about_a_new_document_at_once(server: Server) -> None:
    """Forbids an encode for each of them, and other answers in company."""
    body = {"messages": in_parts(DOCUMENT, QUESTION), "max_tokens": 20}
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: server.post(CHAT, body), range(6)))
    outcomes = sorted(answer.headers["x-star-cache"] for answer in answers)
    assert outcomes.count("miss") == 1
    assert server.metric("encodes_total", outcome="done") == 1
    assert len({text_of(answer) for answer in answers}) == 1
    assert ANSWER in text_of(answers[0])


def test_marks_and_files_cut_alike(quick: Server) -> None:
    """Forbids a second encode of the same text because a mark came with it."""
    marked = ask(quick, in_parts(DOCUMENT, QUESTION, mark=True))
    assert marked.headers["x-star-rule"] == "mark"
    file = quick.post("/v1/files", files={"file": ("a.txt", DOCUMENT.encode())}).json()
    part = {"type": "file", "file": {"file_id": file["id"]}}
    message = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
    by_file = ask(quick, [message])
    assert by_file.headers["x-star-rule"] == "file"
    assert by_file.headers["x-star-cache"] == "hit"
    assert text_of(by_file) == text_of(marked)
    assert quick.metric("encodes_total", outcome="done") == 1


def test_nothing_is_kept_that_is_not_marked(tmp_path: Path) -> None:
    with running(implicit=False) as server:
        plain = ask(server, in_parts(DOCUMENT, QUESTION))
        assert plain.headers["x-star-cache"] == "none"
        assert server.get(CONTEXTS).json()["data"] == []
        marked = ask(server, in_parts(DOCUMENT, QUESTION, mark=True))
        assert marked.headers["x-star-cache"] == "miss"


def test_a_conversation_goes_on_from_its_document(quick: Server) -> None:
    """Forbids that each turn of a chat reads the document again."""
    messages = [{"role": "user", "content": f"{DOCUMENT}\n{QUESTION}"}]
    first = ask(quick, messages)
    assert (first.headers["x-star-rule"], first.headers["x-star-cache"]) == ("implicit", "miss")
    messages.append({"role": "assistant", "content": "It is 7."})
    messages.append({"role": "user", "content": "And what else?"})
    second = ask(quick, messages)
    assert (second.headers["x-star-rule"], second.headers["x-star-cache"]) == ("prefix", "hit")
    assert second.headers["x-star-context"] == first.headers["x-star-context"]
    ids = engine().tokenizer.apply_chat_template(messages, return_dict=False)
    assert second.json()["usage"]["prompt_tokens"] == len(ids)
    # Only what is marked counts for who asks for that.
    explicit = ask(quick, messages, prompt_cache_options={"mode": "explicit"})
    assert (explicit.headers["x-star-rule"], explicit.headers["x-star-cache"]) == ("none", "none")
    counted = quick.post(f"{CHAT}/input_tokens", {"messages": messages}).json()
    assert counted["input_tokens"] == len(ids)
    assert counted["input_tokens_details"]["cached_tokens"] == counted["context_tokens"] > 300


def test_short_prompts_keep_nothing(quick: Server) -> None:
    """Forbids that titles and tags, which clients ask for by themselves, evict documents."""
    assert ask(quick, ASK).headers["x-star-cache"] == "none"
    assert quick.metric("encodes_total", outcome="done") == 0


def test_a_file_with_its_progress(quick: Server) -> None:
    with httpx.stream(
        "POST",
        f"{quick.url}{CONTEXTS}",
        files={"file": ("book.txt", DOCUMENT.encode())},
        data={"ttl": "60", "pin": "true"},
        headers={"accept": "text/event-stream"},
        timeout=60,
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    states = [json.loads(line[6:]) for line in lines[:-1]]
    assert states[-1]["status"] == "ready"
    assert (states[-1]["name"], states[-1]["pinned"], states[-1]["ttl"]) == ("book.txt", True, 60)


def test_a_context_that_goes_on(server: Server) -> None:
    context = create(server, text=DOCUMENT)
    more = "The secret number for amber-fox is 5550123.\n"
    response = server.post(f"{CONTEXTS}/{context['id']}/extend?wait=true", {"text": more})
    assert response.status_code in (200, 201), response.text
    longer = response.json()
    assert longer["tokens"] > context["tokens"]
    question = [{"role": "user", "content": "What is the secret number for amber-fox?"}]
    assert "5550123" in text_of(ask(server, question, context=longer["id"]))
    assert create(server, text=DOCUMENT + more)["id"] == longer["id"]
    assert server.get(f"{CONTEXTS}/{context['id']}").json()["status"] == "ready"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give exactly one of text, messages, token_ids and file_id"),
        ({"text": "a", "token_ids": [1]}, "the body has text, token_ids"),
        ({"text": 5}, "text 5: expected a string"),
        ({"text": ""}, "at least 1 token"),
        ({"token_ids": [99999]}, "99999"),
        ({"text": "a", "ttl": 0}, "ttl 0 is out of range; give 1 to 1,000,000,000"),
        ({"text": "a", "ttl": "1h"}, "ttl '1h': expected a number of seconds"),
        ({"text": "a", "pinned": True}, "pinned True is not supported; give pin"),
        ({"token_ids": ["a"]}, "token_ids ['a']: expected a list of integers"),
        ({"token_ids": [True]}, "expected a list of integers"),
        ({"text": "a", "pin": "yes"}, "pin 'yes': expected true or false"),
    ],
)
def test_documents_that_cannot_be_kept(quick: Server, body: dict[str, Any], message: str) -> None:
    response = quick.post(CONTEXTS, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    # The field at fault is the last one that is given.
    assert error["param"] == [*body, "text"][max(len(body) - 1, 0)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ttl": "soon"}, "ttl 'soon': expected a number of seconds"),
        ({"pin": "maybe"}, "pin 'maybe': expected true or false"),
    ],
)
def test_fields_of_a_form_that_cannot_work(
    quick: Server, fields: dict[str, str], message: str
) -> None:
    files = {"file": ("sky.txt", b"The sky is blue.")}
    response = quick.post(CONTEXTS, files=files, data=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"] == message


def test_contexts_of_another_tenant() -> None:
    """Forbids hits across keys, and ids that work for others."""
    keys = Keys.of({"key-of-ann": "ann", "key-of-bob": "bob"})
    ann = {"headers": {"authorization": "Bearer key-of-ann"}}
    bob = {"headers": {"authorization": "Bearer key-of-bob"}}
    body = {"messages": in_parts(DOCUMENT, QUESTION, mark=True), "max_tokens": 2}
    with running(keys=keys) as server:
        first = server.post(CHAT, body, **ann)
        id = first.headers["x-star-context"]
        assert server.post(CHAT, body, **ann).headers["x-star-cache"] == "hit"
        assert server.post(CHAT, body, **bob).headers["x-star-cache"] == "miss"
        assert server.get(f"{CONTEXTS}/{id}", **ann).status_code == 200
        assert server.get(f"{CONTEXTS}/{id}", **bob).status_code == 404
        used = server.post(CHAT, {"messages": ASK, "context": id}, **bob)
        assert used.json()["error"]["code"] == "context_not_found"
        assert len(server.get(CONTEXTS, **bob).json()["data"]) == 1


def test_contexts_survive_a_restart(tmp_path: Path) -> None:
    with running(store=str(tmp_path)) as server:
        context = create(server, text=DOCUMENT)
        before = text_of(ask(server, ASK, context=context["id"]))
    with running(store=str(tmp_path)) as server:
        again = server.get(f"{CONTEXTS}/{context['id']}").json()
        assert (again["status"], again["location"]) == ("ready", "disk")
        answer = ask(server, ASK, context=context["id"])
        assert text_of(answer) == before
        assert answer.headers["x-star-cache"] == "hit"
        assert ask(server, in_parts(DOCUMENT, QUESTION)).headers["x-star-cache"] == "hit"
        assert eventually(server.is_idle)
        assert server.metric("encodes_total", outcome="done") == 0
