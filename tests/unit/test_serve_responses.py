"""`/v1/responses`: answers that are kept and continued, by OpenAI's client and by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from star_attention.serve.keys import Keys
from tests.servers import (
    ASK,
    DOCUMENT,
    NAME,
    QUESTION,
    Server,
    events_of,
    eventually,
    running,
    saying,
)
from tests.talkers import CHATML, byte_level, talker

PATH = "/v1/responses"
CHAT = "/v1/chat/completions"
MARK = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    """Return a request with one user message."""
    question = [{"role": "user", "content": list(parts)}] if parts else QUESTION
    return {"model": NAME, "input": question, "max_output_tokens": 8} | fields


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "input_text", "text": value, **fields}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, which are numbered from 0."""
    found = events_of(response)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def answer_of(response: dict[str, Any]) -> str:
    return response["output"][-1]["content"][0]["text"]


def test_an_answer_is_that_of_a_chat(server: Server) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ASK]
    chat = server.post(CHAT, {"messages": messages, "max_tokens": 8}).json()
    request = body(instructions="Be brief.", metadata={"a": "b"}, temperature=None)
    answer = server.post(PATH, request).json()
    assert answer_of(answer) == chat["choices"][0]["message"]["content"]
    assert (answer["object"], answer["model"], answer["status"]) == ("response", NAME, "incomplete")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (answer["instructions"], answer["metadata"]) == ("Be brief.", {"a": "b"})
    usage = answer["usage"]
    assert usage["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["total_tokens"] == chat["usage"]["total_tokens"]
    assert server.post(f"{PATH}/input_tokens", request).json() == {
        "object": "response.input_tokens",
        "input_tokens": usage["input_tokens"],
    }


def test_events_in_their_order(server: Server) -> None:
    request = body(text(DOCUMENT + "Order."), text(QUESTION))
    whole = server.post(PATH, request).json()
    stream = events(server.post(PATH, request | {"stream": True}))
    kinds = [each["type"].removeprefix("response.") for each in stream]
    assert list(dict.fromkeys(kinds)) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    deltas = [each["delta"] for each in stream if each["type"].endswith("text.delta")]
    assert "".join(deltas) == answer_of(whole)
    ids = {each["item_id"] for each in stream if "item_id" in each}
    last = stream[-1]["response"]
    assert ids == {last["output"][0]["id"]}
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"]["input_tokens_details"]["cached_tokens"] > 256


def test_a_conversation_goes_on_with_the_same_context(
    server: Server, client: openai.OpenAI
) -> None:
    """Forbids that a document is sent or encoded again with each question."""
    create = client.responses.with_raw_response.create
    parts = [text(f"On. {DOCUMENT}", **MARK), text(QUESTION)]
    first = create(model=NAME, input=[{"role": "user", "content": parts}], max_output_tokens=8)
    before = server.metric("encodes_total", outcome="done")
    previous = first.parse()
    for _ in range(2):
        more = create(
            model=NAME, input="And?", previous_response_id=previous.id, max_output_tokens=8
        )
        assert more.headers["x-star-context"] == first.headers["x-star-context"]
        usage = more.parse().usage
        assert usage.input_tokens_details.cached_tokens > 256
        assert usage.input_tokens > previous.usage.total_tokens
        previous = more.parse()
    assert server.metric("encodes_total", outcome="done") == before
    said = previous.output_text
    messages = [
        {"role": "user", "content": [{"type": "text", "text": part["text"]} for part in parts]},
        {"role": "assistant", "content": first.parse().output_text},
        {"role": "user", "content": "And?"},
    ]
    expected = server.post(CHAT, {"messages": messages, "max_tokens": 8}).json()
    second = client.responses.retrieve(previous.previous_response_id)
    assert second.output_text == expected["choices"][0]["message"]["content"]
    assert client.responses.retrieve(previous.id).output_text == said


def test_a_conversation_on_a_context_that_is_named(server: Server) -> None:
    id = server.post("/v1/contexts?wait=true", {"text": f"Named. {DOCUMENT}"}).json()["id"]
    first = server.post(PATH, body(context=id))
    more = server.post(PATH, body(previous_response_id=first.json()["id"]))
    assert [each.headers["x-star-rule"] for each in (first, more)] == ["context"] * 2
    assert more.headers["x-star-context"] == id


def test_what_is_not_stored_is_not_there(client: openai.OpenAI) -> None:
    kept = client.responses.create(model=NAME, input="Hi", max_output_tokens=1)
    assert client.responses.retrieve(kept.id) == kept
    client.responses.delete(kept.id)
    gone = client.responses.create(model=NAME, input="Hi", max_output_tokens=1, store=False)
    for id in (kept.id, gone.id):
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.retrieve(id)
        assert missing.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model=NAME, input="Hi", previous_response_id=gone.id)
    assert missing.value.code == "previous_response_not_found"
    assert "send the whole conversation" in missing.value.message


def test_what_comes_back_may_have_any_character(server: Server) -> None:
    """Forbids 500 for half of a character, which JSON can hold and UTF-8 cannot."""
    data = json.dumps(body(metadata={"a": "\ud83e", "b": "🦦"}, user="\ud83e"))
    answer = httpx.post(f"{server.url}{PATH}", content=data)
    assert answer.json()["metadata"] == {"a": "\ud83e", "b": "🦦"}
    assert server.get(f"{PATH}/{answer.json()['id']}").json() == answer.json()


def test_a_server_that_keeps_none() -> None:
    with running(max_responses=0) as server:
        response = server.post(PATH, body()).json()
        assert response["store"] is False
        assert server.get(f"{PATH}/{response['id']}").status_code == 404


def test_responses_of_another_tenant() -> None:
    """Forbids that an id is enough to read or continue what somebody else has said."""
    with running(keys=Keys.of({"key-a": "ann", "key-b": "bob"})) as server:
        own, other = ({"authorization": f"Bearer key-{name}"} for name in "ab")
        id = server.post(PATH, body(), headers=own).json()["id"]
        item = server.get(f"{PATH}/{id}", headers=own).json()["output"][0]["id"]
        reference = body(input=[{"type": "item_reference", "id": item}, *ASK])
        for attempt in (
            server.get(f"{PATH}/{id}", headers=other),
            httpx.delete(f"{server.url}{PATH}/{id}", headers=other),
            server.post(f"{PATH}/{id}/cancel", headers=other),
            server.post(PATH, body(previous_response_id=id), headers=other),
            server.post(PATH, reference, headers=other),
        ):
            assert attempt.status_code == 404
        assert server.post(PATH, reference, headers=own).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_canceled_by_another_connection(server: Server, stream: bool) -> None:
    request = body(max_output_tokens=60_000, ignore_eos=True, stream=stream)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(PATH, request)))
    before = set(ids(server))
    thread.start()
    assert eventually(lambda: bool(set(ids(server)) - before))
    (id,) = set(ids(server)) - before
    assert server.get(f"{PATH}/{id}").json()["status"] == "in_progress"
    early = server.post(PATH, body(previous_response_id=id))
    assert "has no answer, its status is in_progress" in early.json()["error"]["message"]
    assert server.post(f"{PATH}/{id}/cancel").json()["status"] == "cancelled"
    thread.join()
    assert eventually(server.is_idle)
    (answer,) = answers
    if stream:
        failed, error = events(answer)[-2:]
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "cancelled")
        assert error["error"]["code"] == "response_cancelled"
    else:
        assert answer.status_code == 409
    again = server.post(f"{PATH}/{id}/cancel")
    assert "has ended, its status is cancelled; only one" in again.json()["error"]["message"]


def ids(server: Server) -> list[str]:
    """Return the ids of all responses that a server keeps."""
    return list(server.service.responses.of_tenant("local"))


def test_a_client_that_leaves_ends_its_response(server: Server) -> None:
    request = body(max_output_tokens=60_000, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{server.url}{PATH}", json=request) as response:
        first = next(response.iter_lines())
        assert first == "event: response.created"
        id = ids(server)[-1]
    assert eventually(server.is_idle)
    assert server.get(f"{PATH}/{id}").json()["status"] == "cancelled"


def test_an_error_in_a_stream_is_raised_by_the_client(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids an error that no client sees, after the first byte."""
    add = server.service.engine.batch.add

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the secret prompt")

    monkeypatch.setattr(server.service.engine.batch, "add", fail)
    stream = client.responses.create(model=NAME, input="Hi", stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="the server failed") as error:
        seen += [event.type for event in stream]
    monkeypatch.setattr(server.service.engine.batch, "add", add)
    assert "secret" not in str(error.value)


FORMS = {
    "text": "Hi",
    "a message": [{"role": "user", "content": "Hi"}],
    "a typed message": [{"type": "message", "role": "user", "content": [text("Hi")]}],
    "a file": [{"role": "user", "content": [{"type": "input_file", "file_data": "SGk="}]}],
    "text of a file": [
        {"role": "user", "content": [{"type": "input_file", "filename": "a", "text": "Hi"}]}
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_in_every_form(server: Server, form: str) -> None:
    expected = server.post(
        f"{CHAT}/input_tokens", {"messages": [{"role": "user", "content": "Hi"}]}
    ).json()["input_tokens"]
    counted = server.post(f"{PATH}/input_tokens", {"input": FORMS[form]}).json()
    assert counted["input_tokens"] == expected


def test_a_conversation_of_items(server: Server) -> None:
    """What a client sends back that keeps its conversations by itself."""
    answer = server.post(PATH, body()).json()
    thoughts = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    question = [{"role": "user", "content": QUESTION}]
    items = [*question, thoughts, *answer["output"], {"role": "developer", "content": "B"}, *ASK]
    messages = [
        *question,
        {"role": "assistant", "content": answer_of(answer)},
        {"role": "developer", "content": "B"},
        *ASK,
    ]
    expected = server.post(f"{CHAT}/input_tokens", {"messages": messages}).json()["input_tokens"]
    counted = server.post(f"{PATH}/input_tokens", {"input": items}).json()
    assert counted["input_tokens"] == expected


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "expected a text, or a list of items that is not empty"),
        ({"input": ""}, "input", "input '': expected a text"),
        ({"tools": [{"type": "web_search"}]}, "tools", "give tools of type function"),
        ({"background": True}, "background", "background True is not supported"),
        ({"conversation": "c"}, "conversation", "give previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "give its text as input"),
        ({"max_tokens": 3}, "max_tokens", "give max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens 0 is out of range"),
        ({"max_output_tokens": 70_000}, "input", "or lower max_output_tokens."),
        ({"truncation": "auto"}, "truncation", "truncation 'auto' is not supported"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "text.format 'xml'"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "text.verbosity 'low'"),
        ({"include": "all"}, "include", "include 'all': expected a list of strings"),
        ({"input": [{"type": "x_call"}]}, "input", "an item of type 'x_call'"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, None, "there is no item 'm'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "u"}]}]},
            "input",
            "no URL is opened",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    server: Server, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = server.post(PATH, body() | fields)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param
    assert message in error["message"]


def test_what_asks_for_nothing_is_ignored(server: Server) -> None:
    """What clients of programmers send with each request."""
    fields = {
        "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "reasoning": {"effort": "medium", "summary": "auto"},
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
    }
    plain = server.post(PATH, body()).json()
    answer = server.post(PATH, body(**fields)).json()
    assert answer_of(answer) == answer_of(plain)


def test_answers_follow_a_schema_in_every_protocol(server: Server) -> None:
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {"number": {"type": "integer"}},
        "required": ["number"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "name": "n", "schema": schema}
    response = server.post(PATH, body(text={"format": wanted})).json()
    fields = {"messages": ASK, "max_tokens": 8, "output_config": {"format": wanted}}
    message = server.post("/v1/messages", fields).json()
    for answer in (answer_of(response), message["content"][0]["text"]):
        assert answer.startswith('{"number"')


def test_logprobs(server: Server) -> None:
    request = body(include=["message.output_text.logprobs"], top_logprobs=2)
    content = server.post(PATH, request).json()["output"][0]["content"][0]
    assert len(content["logprobs"]) == 8
    assert len(content["logprobs"][0]["top_logprobs"]) == 2
    done = events(server.post(PATH, request | {"stream": True}))[-4]
    assert (done["type"], done["logprobs"]) == ("response.output_text.done", content["logprobs"])


def test_thoughts_are_an_item_of_their_own() -> None:
    tokenizer = byte_level(plain=("<think>", "</think>"), chat="{# <think> #}" + CHATML)
    with running(talker(tokenizer), before=saying("<think>the cat</think>hello")) as server:
        request = body(max_output_tokens=40)
        answer = server.post(PATH, request).json()
        stream = events(server.post(PATH, request | {"stream": True}))
        more = server.post(PATH, body(previous_response_id=answer["id"]))
    assert more.status_code == 200
    for response in (answer, stream[-1]["response"]):
        thoughts, message = response["output"]
        assert (thoughts["type"], message["type"]) == ("reasoning", "message")
        assert thoughts["content"] == [{"type": "reasoning_text", "text": "the cat"}]
        assert message["content"][0]["text"] == "hello"
        thought = tokenizer("<think>the cat</think>").input_ids
        assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": len(thought)}
    added = [each["output_index"] for each in stream if each["type"].endswith("item.added")]
    assert added == [0, 1]
    deltas = [each["delta"] for each in stream if each["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == "the cat"
