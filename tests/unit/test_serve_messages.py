"""`/v1/messages`: Anthropic's protocol over the same answers as chats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from star_attention.serve.http.body import Body
from star_attention.serve.http.messages.reading import read_chat
from star_attention.serve.keys import Keys
from tests.engines import bundled_tokenizer
from tests.servers import ASK, DOCUMENT, NAME, QUESTION, Server, events_of, running, saying
from tests.talkers import CHATML, byte_level, talker

PATH = "/v1/messages"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def body(*content: Any, **fields: Any) -> dict[str, Any]:
    """Return a request with one user message."""
    messages = [{"role": "user", "content": list(content) or QUESTION}]
    return {"model": NAME, "max_tokens": 20, "messages": messages} | fields


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def document(data: str, **fields: Any) -> dict[str, Any]:
    source = {"type": "text", "media_type": "text/plain", "data": data}
    return {"type": "document", "source": source, **fields}


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, which is in Anthropic's envelope."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer["type"] == "error"
    assert answer["request_id"] == response.headers["request-id"]
    return answer["error"]


def test_an_answer_is_that_of_a_chat(server: Server) -> None:
    chat = server.post(CHAT, {"messages": ASK, "max_tokens": 8}).json()
    answer = server.post(PATH, body(max_tokens=8)).json()
    assert answer["content"] == [
        {"type": "text", "text": chat["choices"][0]["message"]["content"], "citations": None}
    ]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", NAME)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == 8


def test_events_in_their_order(server: Server) -> None:
    request = body(document(DOCUMENT + "Order."), text(QUESTION))
    whole = server.post(PATH, request).json()
    start, ping, begin, *deltas, end, last, stop = events_of(
        server.post(PATH, request | {"stream": True})
    )
    message = start["message"]
    assert start["type"] == "message_start"
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert message["usage"]["cache_read_input_tokens"] > 256
    assert ping == {"type": "ping"}
    block = {"type": "text", "text": "", "citations": None}
    assert begin == {"type": "content_block_start", "index": 0, "content_block": block}
    assert {delta["type"] for delta in deltas} == {"content_block_delta"}
    assert {delta["delta"]["type"] for delta in deltas} == {"text_delta"}
    pieces = "".join(delta["delta"]["text"] for delta in deltas)
    assert pieces == whole["content"][0]["text"]
    assert end == {"type": "content_block_stop", "index": 0}
    assert last["type"] == "message_delta"
    assert last["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == 20
    assert stop == {"type": "message_stop"}


@pytest.mark.parametrize(("ttl", "name"), [("5m", "5m"), ("1h", "1h"), (None, "5m")])
def test_each_token_of_a_prompt_is_counted_once(server: Server, ttl: str | None, name: str) -> None:
    mark = {"type": "ephemeral"} | ({"ttl": ttl} if ttl else {})
    request = body(
        text(f"Kept {ttl}. {DOCUMENT}", cache_control=mark), text(QUESTION), system="Be brief."
    )
    tokens = server.post(f"{PATH}/count_tokens", request).json()["input_tokens"]
    first, second = (server.post(PATH, request) for _ in range(2))
    assert first.headers["x-star-rule"] == "mark"
    assert [each.headers["x-star-cache"] for each in (first, second)] == ["miss", "hit"]
    written, read = (each.json()["usage"] for each in (first, second))
    kept = written["cache_creation_input_tokens"]
    assert kept > 256
    assert written["cache_creation"][f"ephemeral_{name}_input_tokens"] == kept
    assert (written["cache_read_input_tokens"], read["cache_read_input_tokens"]) == (0, kept)
    assert read["cache_creation_input_tokens"] == 0
    assert written["input_tokens"] + kept == read["input_tokens"] + kept == tokens
    assert first.json()["content"] == second.json()["content"]


def test_a_document_is_one_context_in_both_protocols(server: Server) -> None:
    """Forbids that the same prompt is encoded again for clients of the other protocol."""
    long = f"Shared. {DOCUMENT}"
    first = server.post(PATH, body(document(long), text(QUESTION), system="Be brief."))
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [text(long, cache_control={"type": "ephemeral"}), text("What else?")],
        },
    ]
    second = server.post(CHAT, {"messages": messages, "max_tokens": 2})
    assert (first.headers["x-star-rule"], second.headers["x-star-rule"]) == ("file", "mark")
    assert second.headers["x-star-cache"] == "hit"
    assert first.headers["x-star-context"] == second.headers["x-star-context"]


def test_a_mark_of_the_whole_request_is_before_the_question(server: Server) -> None:
    mark = {"type": "ephemeral", "ttl": "1h"}
    in_parts = body(text(f"Top. {DOCUMENT}"), text(QUESTION), cache_control=mark)
    answer = server.post(PATH, in_parts)
    assert answer.headers["x-star-rule"] == "mark"
    assert answer.json()["usage"]["cache_creation"]["ephemeral_1h_input_tokens"] > 256
    turns = [
        {"role": "user", "content": f"Turns. {DOCUMENT}"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": QUESTION},
    ]
    answer = server.post(PATH, body(messages=turns, cache_control=mark))
    assert answer.headers["x-star-rule"] == "mark"
    assert answer.json()["usage"]["input_tokens"] < 60
    assert server.post(PATH, body(cache_control=mark)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_is_named(server: Server, stream: bool) -> None:
    text = server.post(PATH, body()).json()["content"][0]["text"]
    stop = text[5:12]
    response = server.post(PATH, body(stop_sequences=["zzz", stop], stream=stream))
    expected = {"stop_reason": "stop_sequence", "stop_sequence": stop}
    if stream:
        assert events_of(response)[-2]["delta"] == expected
    else:
        answer = response.json()
        assert {key: answer[key] for key in expected} == expected
        assert answer["content"][0]["text"] == text[: text.index(stop)]


def test_an_assistant_message_is_continued(server: Server) -> None:
    """Forbids a new turn after a last message of the assistant, which begins the answer."""
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    answer = server.post(PATH, body(messages=begun)).json()
    ids = bundled_tokenizer().apply_chat_template(
        begun, continue_final_message=True, return_dict=False
    )
    expected = server.post("/v1/completions", {"prompt": ids, "max_tokens": 20}).json()
    assert answer["usage"]["input_tokens"] == len(ids)
    assert answer["content"][0]["text"] == expected["choices"][0]["text"]


FORMS = {
    "title": (document("D", title="T", context="C"), ["T\n", "C\n", "D"]),
    "base64": (
        {"type": "document", "source": {"type": "base64", "media_type": "", "data": "RA=="}},
        ["D"],
    ),
    "blocks": (
        {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}},
        ["ab"],
    ),
    "words": ({"type": "document", "source": {"type": "content", "content": "D"}}, ["D"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_documents_in_every_form(server: Server, form: str) -> None:
    block, texts = FORMS[form]
    messages = [{"role": "user", "content": [*map(text, texts), text("?")]}]
    tokens = server.post(f"{CHAT}/input_tokens", {"messages": messages}).json()["input_tokens"]
    counted = server.post(f"{PATH}/count_tokens", body(block, text("?")))
    assert counted.json() == {"input_tokens": tokens}


def test_a_file_that_was_uploaded(server: Server) -> None:
    files = {"file": ("book.txt", DOCUMENT.encode(), "text/plain")}
    id = server.post("/v1/files", files=files).json()["id"]
    block = {"type": "document", "source": {"type": "file", "file_id": id}}
    inline = server.post(PATH, body(document(DOCUMENT), text(QUESTION)))
    uploaded = server.post(PATH, body(block, text(QUESTION)))
    assert uploaded.json()["content"] == inline.json()["content"]
    assert uploaded.headers["x-star-context"] == inline.headers["x-star-context"]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ([], {"tools": [{"name": "f"}]}, "tools ['f'] is not supported; the model's chat template"),
        ([], {"tools": [{"type": "bash_20250124"}]}, "tools of type 'bash_20250124' is not"),
        ([], {"tool_choice": {"type": "any"}}, "tool_choice 'required' is not supported"),
        ([], {"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ([], {"stop": "a"}, "stop 'a' is not supported; give stop_sequences"),
        ([], {"n": 2}, "n 2 is not supported; ask once for each answer"),
        ([], {"stop_sequences": [""]}, "stop_sequences ['']: expected a string, or a list"),
        ([], {"stop_sequences": ["a"] * 17}, "stop_sequences has 17 strings"),
        ([], {"max_tokens": 0}, "max_tokens 0 is out of range"),
        ([], {"messages": []}, "messages []: expected a list of messages"),
        ([], {"output_config": {"format": {"type": "xml"}}}, "output_config.format 'xml'"),
        ([{"type": "image", "source": {}}], {}, "parts of type image; only text can be encoded"),
        ([{"type": "tool_use", "id": "t"}], {}, "which names no function"),
        (
            [{"type": "tool_use", "id": "t", "name": "f"}],
            {},
            "does not write the tool_calls of message 1",
        ),
        (
            [{"type": "document", "source": {"type": "url", "url": "http://x"}}],
            {},
            "a source of type 'url'; give its text",
        ),
        (
            [{"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}}],
            {},
            "blocks that are not text",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    server: Server, content: list[Any], fields: dict[str, Any], message: str
) -> None:
    error = problem(server.post(PATH, body(*content, **fields)), 400)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


def test_errors_have_anthropics_form(server: Server) -> None:
    missing = problem(server.post(PATH, body(model="claude")), 404)
    assert missing["type"] == "not_found_error"
    long = problem(server.post(PATH, body(max_tokens=70_000)), 400)
    assert long["message"].startswith("prompt is too long: 70")
    assert "tokens > 65536 maximum. This model's maximum context length is" in long["message"]
    assert problem(server.get(PATH), 405)["type"] == "invalid_request_error"
    assert set(server.post(CHAT, {}).json()) == {"error"}


def test_keys_in_anthropics_header() -> None:
    with running(keys=Keys.of({"secret-of-ann": "ann"})) as server:
        wrong = server.post(PATH, body(), headers={"x-api-key": "wrong"})
        assert problem(wrong, 401)["type"] == "authentication_error"
        right = {"x-api-key": "secret-of-ann", "anthropic-version": "2023-06-01"}
        assert server.post(PATH, body(max_tokens=1), headers=right).status_code == 200


def test_what_asks_for_nothing_is_ignored(server: Server) -> None:
    fields = {
        "metadata": {"user_id": "somebody"},
        "service_tier": "auto",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "high"},
        "tools": [],
        "tool_choice": {"type": "auto"},
        "stop_sequences": [],
        "an_unknown_field": 1,
    }
    plain = server.post(PATH, body()).json()
    assert server.post(PATH, body(**fields)).json()["content"] == plain["content"]


def test_thinking_is_an_argument_of_templates_that_read_it() -> None:
    fields = {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}
    for read, expected in [
        ({"enable_thinking"}, {"enable_thinking": False}),
        ({"reasoning_effort"}, {"reasoning_effort": "low"}),
        (set(), None),
    ]:
        request = Body(body(**fields))
        _, chat = read_chat(request, read.__contains__)
        assert chat.fields.get("chat_template_kwargs") == expected


def test_thoughts_come_in_a_block_of_their_own() -> None:
    """And thoughts that come back with a conversation are the assistant's, not its text."""
    tokenizer = byte_level(plain=("<think>", "</think>"), chat="{# <think> #}" + CHATML)
    said = "<think>the cat</think>hello"
    with running(talker(tokenizer), before=saying(said)) as server:
        answer = server.post(PATH, body(messages=ASK)).json()
        stream = events_of(server.post(PATH, body(messages=ASK, stream=True)))
        again = [*ASK, {"role": "assistant", "content": answer["content"]}, *ASK]
        assert server.post(PATH, body(messages=again)).status_code == 200
    assert answer["content"] == [
        {"type": "thinking", "thinking": "the cat", "signature": ""},
        {"type": "text", "text": "hello", "citations": None},
    ]
    kinds = [each["content_block"]["type"] for each in stream if "content_block" in each]
    assert kinds == ["thinking", "text"]
    deltas = [each["delta"] for each in stream if each["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "the cat"
    assert "".join(delta.get("text", "") for delta in deltas) == "hello"
    assert [each["index"] for each in stream if each["type"] == "content_block_stop"] == [0, 1]
