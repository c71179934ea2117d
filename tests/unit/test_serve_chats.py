"""Chats of kept documents: opened once, and no more of them held than a server allows."""

from __future__ import annotations

import gc
import sys
import tracemalloc
import weakref
from dataclasses import replace
from typing import Any

import httpx
import pytest

from star_attention.hf.text import chat
from star_attention.serve import reading
from star_attention.serve.chats import Chats
from star_attention.serve.contexts.entry import Content
from star_attention.serve.continuing import Endings
from tests.servers import Server, eventually, quick_engine, running
from tests.unit.test_serve_tools import engine as tools_engine

QUESTION = [{"role": "user", "content": "Why?"}]
ROOM = 2**20


def content_of(text: str) -> Content:
    return reading.document(Chats(ROOM), quick_engine(), reading.Source(text=text))


def ask(chats: Chats, content: Content) -> reading.Piece:
    return reading.on_context(chats, quick_engine(), content, QUESTION, {})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments with which chats are opened."""
    calls, open_context = [], chat.open_context

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return open_context(*arguments)

    monkeypatch.setattr(chat, "open_context", counted)
    return calls


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_kept_chat_is_opened_once(opened: list[Any], *, is_cut: bool) -> None:
    """Forbids a question that renders a whole book several times, for 20 ms; none is held on to."""
    chats, content = Chats(ROOM), content_of("The sky is blue. " * 50)
    if is_cut:
        # What is kept of a chat that was cut after its document.
        content = replace(content, messages=None)
    first = ask(chats, content)
    opened.clear()
    again = ask(chats, content)
    assert again.query_ids == first.query_ids
    assert (again.content is content) == (not is_cut)
    assert opened == []
    other = replace(content)
    assert ask(chats, other).query_ids == first.query_ids
    assert opened
    del other
    gone = weakref.ref(content)
    del content, first, again
    gc.collect()
    assert gone() is None
    assert chats.nbytes == 0


@pytest.mark.parametrize("is_cut", [False, True])
def test_chats_of_many_documents_take_so_many_bytes(opened: list[Any], *, is_cut: bool) -> None:
    """Forbids that each kept document has its text once more in memory, without an end."""
    contents = [content_of(f"The sky of day {day} is blue. " * 400) for day in range(12)]
    if is_cut:
        contents = [replace(content, messages=None) for content in contents]
    chats = Chats(ROOM)
    queries = [ask(chats, content).query_ids for content in contents]
    size = chats.nbytes // len(contents)
    assert size > sys.getsizeof(contents[0].text)
    chats = Chats(5 * size)
    for content, query in zip(contents, queries, strict=True):
        # The first one is asked all the time.
        assert ask(chats, contents[0]).query_ids == queries[0]
        assert ask(chats, content).query_ids == query
        assert chats.nbytes <= 5 * size
    assert chats.nbytes > 3 * size
    opened.clear()
    for content in (contents[0], *contents[-3:]):
        ask(chats, content)
    assert opened == []
    assert ask(chats, contents[1]).query_ids == queries[1]
    assert opened


def test_a_chat_beyond_all_bytes_is_asked_and_not_held() -> None:
    chats, content = Chats(1000), content_of("The sky is blue. " * 400)
    assert ask(chats, content).query_ids == ask(Chats(ROOM), content).query_ids
    assert chats.nbytes == 0


def test_many_short_messages_count_more_than_their_texts() -> None:
    """What Python takes for a message is more than most of them say."""
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant") * 500]
    content = reading.document(Chats(ROOM), quick_engine(), reading.Source(messages=messages))
    chats = Chats(ROOM)
    ask(chats, content)
    assert chats.nbytes > 1000 * sys.getsizeof(messages[0])


def test_no_tools_are_held_for_where_an_answer_begins() -> None:
    """Forbids that the tools of each of many requests stay in memory, as long as a book."""
    star, endings = tools_engine(), Endings()
    start = endings.of(star, {"tools": []})
    assert start[0].endswith("<|im_start|>assistant\n")
    tracemalloc.start()
    try:
        for number in range(20):
            function = {"name": f"f{number}", "description": "Looks around. " * 5000}
            assert endings.of(star, {"tools": [{"function": function}]}) == start
            del function
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One description has 70,000 characters.
    assert held < 200_000


def keep(server: Server, text: str) -> str:
    created = server.post("/v1/contexts?wait=true", {"text": text})
    assert created.status_code == 201, created.text
    id: str = created.json()["id"]
    return id


def test_each_server_holds_chats_of_its_own_documents() -> None:
    """Within its limit, whoever asks, and no longer than the documents."""
    with running(max_body=8192, max_context_bytes=2**26) as server, running() as other:
        chats = server.service.chats
        ids = [keep(server, f"The sky of day {day} is blue. " * 200) for day in range(8)]
        for id in ids * 2:
            body = {"context": id, "messages": QUESTION, "max_tokens": 1}
            assert server.post("/v1/chat/completions", body).status_code == 200
            assert 0 < chats.nbytes <= 4 * 8192
        assert other.service.chats.nbytes == 0
        for id in ids:
            assert httpx.delete(f"{server.url}/v1/contexts/{id}").status_code == 200
        assert eventually(lambda: chats.nbytes == 0)
