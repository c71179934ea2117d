"""`serve` refuses with a status, a code and a message that name value, limit and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from star_attention.cli import serving
from star_attention.serve.logs import log_failure
from tests.servers import ASK, NAME, Server, eventually, running

CHAT = "/v1/chat/completions"
LIMIT = 20_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(max_body=LIMIT, max_answers=4, max_stops=2, max_tokens=5000) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def file(fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "file", "file": fields}]}]


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, which is in OpenAI's envelope."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "max_tokens 0 is out of range; give 1 or more"),
        ({"max_tokens": 5001}, "max_tokens", "more than this server allows, 5,000; ask for fewer"),
        ({"max_tokens": "9"}, "max_tokens", "max_tokens '9': expected an integer"),
        ({"temperature": 10**400}, "temperature", "is out of range; give 0 to 100"),
        ({"temperature": -1}, "temperature", "temperature -1 is out of range; give 0 to 100"),
        ({"top_p": 1.5}, "top_p", "top_p 1.5 is out of range; give 0 to 1"),
        ({"stream": "yes"}, "stream", "stream 'yes': expected true or false"),
        ({"n": 5}, "n", "n 5 is out of range; give 1 to 4"),
        ({"stop": ["a", "b", "c"]}, "stop", "stop has 3 strings"),
        ({"stop": [""]}, "stop", "expected a string, or a list of strings that are not empty"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs 2 needs logprobs true; set it"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "give 0 to 20"),
        ({"tools": [{"type": "function"}]}, "tools", "whose function has no name"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty 0.5 is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml' is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "has no schema"),
        ({"chat_template": "{{ x }}"}, "chat_template", "templates of requests are not run"),
        ({"messages": []}, "messages", "expected a list of messages that is not empty"),
        ({"messages": None}, "messages", "messages is missing: expected a list of messages"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "template does not read it; leave it"),
        ({"messages": [1]}, "messages", "message 1 of 1 is of type int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image"),
        ({"messages": file({"file_data": "!"})}, "messages", "is not base64"),
        ({"messages": file({})}, "messages", "neither file_id nor file_data"),
    ],
)
def test_fields_that_cannot_work(
    server: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    error = problem(server.post(CHAT, {"model": NAME, "messages": ASK} | fields), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"content": "Hi"}],
        ["Hi"],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    ],
)
def test_messages_that_cannot_be_read(server: Server, messages: list[Any]) -> None:
    """Forbids a 500 or a 422; no URL of a client's is opened."""
    error = problem(server.post(CHAT, {"messages": messages}), 400)
    assert error["message"]


def test_fields_that_ask_for_nothing_or_that_nobody_knows(server: Server) -> None:
    """Forbids refusing what clients always send; what has no effect is counted."""
    fields = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "n": 1,
        "logprobs": False,
        "top_p": 1,
        "tool_choice": "none",
        "tools": [],
        "response_format": {"type": "text"},
        "stop": None,
        "seed": None,
        "user": "somebody",
        "an_unknown_field": {"a": 1},
        "stream_options": None,
        "logit_bias": {},
    }
    before = server.metric("ignored_fields_total", field="user")
    plain = server.post(CHAT, {"messages": ASK, "max_tokens": 5}).json()
    answer = server.post(CHAT, {"messages": ASK, "max_tokens": 5} | fields).json()
    assert answer["choices"] == plain["choices"]
    assert server.metric("ignored_fields_total", field="user") == before + 1
    assert server.metric("ignored_fields_total", field="other") >= 1


def test_the_developer_role_and_several_system_messages(server: Server) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": "Answer in English."},
        *ASK,
    ]
    answer = server.post(CHAT, {"messages": messages, "max_tokens": 4})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_positions(server: Server, stream: bool) -> None:
    """Forbids 500, and a 200 with an error in the stream; no forward runs."""
    ids = [5] * 65_000
    body = {"prompt": ids, "max_tokens": 600, "stream": stream}
    with running() as large:
        error = problem(large.post("/v1/completions", body), 400)
        assert large.metric("encodes_total", outcome="done") == 0
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert error["message"].startswith("This model's maximum context length is 65536 tokens.")
    assert (
        "the prompt is too long: 65600 tokens, 65000 of the prompt and 600 of the answer"
        in error["message"]
    )


def test_the_client_raises_its_own_errors(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert missing.value.code == "model_not_found"
    assert "'gpt-9'" in missing.value.message
    assert "'needle-17m'" in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=ASK, n=9)
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body cannot be read as JSON: Expecting property name"),
        (b"[1]", "the body is a list; expected a JSON object"),
        (b'{"a": "\xff"}', "the body cannot be read as JSON: it is not UTF-8"),
        (b'{"a": NaN}', "the body cannot be read as JSON: NaN is not a number in JSON"),
        (b"[" * 5000, "more than 100 lists or objects in each other"),
        (b"", "the body cannot be read as JSON: Expecting value"),
    ],
)
def test_bodies_that_are_no_objects(server: Server, body: bytes, message: str) -> None:
    response = httpx.post(f"{server.url}{CHAT}", content=body)
    error = problem(response, 400)
    assert message in error["message"]
    assert error["code"] == "invalid_json"


def test_a_body_beyond_the_limit(server: Server) -> None:
    """Forbids holding more than the limit, with a length and without one."""
    text = json.dumps({"messages": [{"role": "user", "content": "x" * LIMIT}]}).encode()
    error = problem(httpx.post(f"{server.url}{CHAT}", content=text), 413)
    assert f"the body has {len(text):,} bytes, more than the server's 20,000" in error["message"]
    assert error["code"] == "request_too_large"
    pieces = (text[at : at + 1000] for at in range(0, len(text), 1000))
    error = problem(httpx.post(f"{server.url}{CHAT}", content=pieces), 413)
    assert "more than 20,000 bytes" in error["message"]
    padding = " " * (LIMIT - 60)
    body = json.dumps({"messages": ASK, "max_tokens": 1})
    most = (body + padding)[:LIMIT].ljust(LIMIT).encode()
    assert httpx.post(f"{server.url}{CHAT}", content=most, timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"prompt": "Hi"}, "prompt is for /v1/completions"),
        (CHAT, {"input": "Hi"}, "input is for /v1/responses"),
        ("/v1/completions", {"messages": ASK}, "messages is for /v1/chat/completions"),
        ("/v1/responses", {"messages": ASK}, "messages is for /v1/chat/completions"),
        ("/v1/completions", {}, "prompt is missing: expected a string, a list of strings, or"),
        ("/v1/responses", {}, "input is missing: expected a text, or a list of items"),
    ],
)
def test_requests_without_a_prompt(
    server: Server, path: str, body: dict[str, Any], message: str
) -> None:
    """Forbids "messages None", for a field that the client did not send."""
    error = problem(server.post(path, body), 400)
    assert message in error["message"]
    assert error["code"] == "missing_required_parameter"


def test_a_context_that_there_is_not(server: Server) -> None:
    for path, prompt in ((CHAT, {"messages": ASK}), ("/v1/completions", {"prompt": "Hi there"})):
        error = problem(server.post(path, {**prompt, "context": "ctx_none"}), 404)
        assert (error["param"], error["code"]) == ("context", "context_not_found")


def test_files_that_do_not_fit_beside_others() -> None:
    """A client that asks again at once finds as little room."""
    with running(max_body=4096) as server:
        file, form = {"file": ("a.txt", b"x" * 3000)}, {"purpose": "user_data"}
        made = [server.post("/v1/files", files=file, data=form) for _ in range(5)]
        assert [each.status_code for each in made] == [200, 200, 200, 200, 507]
        assert problem(made[-1], 507)["code"] == "files_full"
        assert made[-1].headers["x-should-retry"] == "false"


def test_paths_and_methods_that_are_not_there(server: Server) -> None:
    error = problem(server.get("/v1/embeddings"), 404)
    assert error["code"] == "not_found"
    assert error["message"] == "there is no path '/v1/embeddings' on this server"
    for path, meant in (
        ("/chat/completions", CHAT),
        ("/v1/v1/messages", "/v1/messages"),
        ("/responses", "/v1/responses"),
    ):
        # A base URL without /v1, or with it where the client adds it.
        message = problem(server.post(path, {}), 404)["message"]
        assert f"use {meant}: change the client's base URL" in message
    response = server.get(CHAT)
    error = problem(response, 405)
    assert "takes POST" in error["message"]
    assert response.headers["allow"] == "POST"


def test_scripts_of_other_sites_are_refused(server: Server) -> None:
    """Forbids that a page in a browser on this machine uses a server without keys."""
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
        error = problem(server.get("/v1/models", headers=headers), 403)
        assert error["code"] == "host_not_allowed"
    own = {"host": "localhost:1234", "origin": "http://127.0.0.1:8000"}
    assert server.get("/v1/models", headers=own).status_code == 200


def test_a_defect_says_no_more_than_its_id(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Forbids tracebacks and prompts in answers and in the log."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyError("the secret prompt")

    monkeypatch.setattr(server.service.lanes, "run", fail)
    response = server.post(CHAT, {"messages": ASK})
    error = problem(response, 500)
    request_id = response.headers["x-request-id"]
    assert error["message"] == (
        f"the server failed (KeyError); its log has more under request {request_id}"
    )
    assert request_id in caplog.text
    assert "secret" not in caplog.text


def test_the_log_tells_what_happened(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Forbids a log in which a refusal looks like any other, among lines of what is polled."""
    caplog.set_level("INFO", "star_attention.serve")
    answer = server.post(CHAT, {"messages": ASK, "max_tokens": 1})
    refused = server.post(CHAT, {"messages": ASK, "n": 0})
    server.get("/health")
    server.get("/metrics")
    ids = [response.headers["x-request-id"] for response in (answer, refused)]
    expected = [f"{ids[0]} none none", f"{ids[1]} invalid_value"]
    lines = [record.getMessage() for record in caplog.records]
    # A line comes after its answer: that of the test before may be here, too.
    told = [line.partition(" s ")[2] for line in lines]
    assert [each for each in told if each.split()[0] in ids] == expected
    assert not any(path in line for line in lines for path in ("/health", "/metrics"))


def test_a_log_of_json_objects(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is an object, also of a path with line breaks and of a defect with its places."""
    written: list[str] = []

    def are_written() -> bool:
        # A line comes after its answer.
        written.append(capsys.readouterr().err)
        return all(each in "".join(written) for each in ids)

    with serving._logged_requests(quiet=False, as_json=True):
        server.get("/health")
        log_failure("request \n1", KeyError("the secret prompt"))
        responses = [
            server.post(CHAT, {"messages": ASK, "max_tokens": 1}),
            server.post(CHAT, {"messages": ASK, "n": 0}),
            server.get("/a%0Ab"),
        ]
        ids = [response.headers["x-request-id"] for response in responses]
        assert eventually(are_written)
    lines = [json.loads(line) for line in "".join(written).splitlines()]
    by_id = {line.get("request_id"): line for line in lines}
    asked, refused, unknown = (by_id[each] for each in ids)
    assert {line.get("path") for line in lines} <= {CHAT, "/metrics", "/a%0Ab", None}
    assert asked["seconds"] >= 0
    wanted = {"message": "request", "level": "info", "method": "POST", "path": CHAT, "status": 200}
    wanted |= {"rule": "none", "cache": "none"}
    assert {name: asked[name] for name in wanted} == wanted
    assert (refused["status"], refused["code"]) == (400, "invalid_value")
    assert (unknown["status"], unknown["path"]) == (404, "/a%0Ab")
    assert "secret" not in json.dumps(lines)
    assert [line["level"] for line in lines if line["message"] != "request"] == ["error"]
    assert all(line["time"].endswith("+00:00") for line in lines)
