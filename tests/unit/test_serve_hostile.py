"""`serve` answers requests that are meant to break it: no defect, no trace in what others see."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from star_attention.generation.json_answers import compile_schema
from star_attention.serve.http import body
from star_attention.serve.http.files import Files
from star_attention.serve.keys import Keys
from star_attention.serve.refusals import RefusalError
from tests.servers import ASK, Server, eventually, running

CHAT = "/v1/chat/completions"
ANN, BOB = ({"authorization": f"Bearer key-{name}"} for name in ("ann", "bob"))
LONE = "\\ud800"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(keys=Keys.of({"key-ann": "ann", "key-bob": "bob"}), max_body=400_000) as server:
        yield server


def refused(response: httpx.Response, code: str, message: str = "") -> None:
    """Check that a request is refused with a 400, as one that cannot work."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == code, error
    assert message in error["message"]


def chat(server: Server, **fields: Any) -> httpx.Response:
    return server.post(CHAT, headers=ANN, json={"messages": ASK, "max_tokens": 1} | fields)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_an_integer_of_400_digits_is_out_of_range(server: Server, field: str) -> None:
    """Not a defect: such an integer is no float."""
    refused(chat(server, **{field: 10**400}), "invalid_value", f"{field} 1000")
    refused(chat(server, **{field: float("1e300")}), "invalid_value", "out of range")


@pytest.mark.parametrize("value", ["²", "٣", "9" * 400, "9" * 5000, "0", "-1", "1e5"])
def test_what_is_no_number_of_seconds_leaves_no_file(server: Server, value: str) -> None:
    """One that expired after the end of time made every later list of files fail."""
    response = server.post(
        "/v1/files",
        headers=ANN,
        files={"file": ("a.txt", b"text")},
        data={"expires_after[seconds]": value},
    )
    refused(response, "invalid_value", "expected 1 to 1000000000 seconds")
    assert server.get("/v1/files", headers=ANN).json()["data"] == []


@pytest.mark.parametrize("value", ["[" * 50_000, "9" * 400, "1e999", "nan"])
def test_a_form_with_another_ttl_is_refused(server: Server, value: str) -> None:
    response = server.post(
        "/v1/contexts", headers=ANN, files={"file": ("a.txt", b"text")}, data={"ttl": value}
    )
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("limit", ["²", "9" * 5000, "0", "1001"])
def test_a_limit_is_a_number_up_to_1000(server: Server, limit: str) -> None:
    response = server.get("/v1/contexts", headers=ANN, params={"limit": limit})
    refused(response, "invalid_value", "expected 1 to 1000")


@pytest.mark.parametrize("field", ["name", "cache_salt", "other"])
def test_half_a_character_breaks_no_list(server: Server, field: str) -> None:
    """As a name it made every later list of contexts fail, as a salt its own request."""
    body = f'{{"text": "a text", "{field}": "{LONE}"}}'
    response = server.post("/v1/contexts", headers=ANN, content=body)
    assert response.status_code in (200, 202), response.text
    assert server.get("/v1/contexts", headers=ANN).status_code == 200
    server.service.store.delete("ann", response.json()["id"])


@pytest.mark.parametrize("charset", ["undefined", "utf-7", "unicode_escape"])
def test_a_form_is_in_utf8(server: Server, charset: str) -> None:
    """Other charsets raised, or made half characters out of ASCII."""
    for text in (b"\\ud800", b"+2AA-"):
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\na\r\n'
        response = server.post(
            "/v1/files",
            headers=ANN | {"content-type": f"multipart/form-data; boundary=x; charset={charset}"},
            content=form % text + b"--x--\r\n",
        )
        if response.status_code == 200:
            server.service.files.delete("ann", response.json()["id"])
        else:
            refused(response, "invalid_value", "not UTF-8")
    assert server.get("/v1/files", headers=ANN).status_code == 200


@pytest.mark.parametrize("path", ["/v1/files", "/v1/contexts"])
def test_what_is_no_form_is_refused_with_a_code(server: Server, path: str) -> None:
    """Refusals of the parser had no code, and did not say what to send."""
    for kind, form in (("; boundary=x", b"--y\r\n\r\n"), ("", b"--y\r\n")):
        headers = ANN | {"content-type": f"multipart/form-data{kind}"}
        response = server.post(path, headers=headers, content=form)
        refused(response, "invalid_value", "send one file, in the field `file`")
        assert response.json()["error"]["param"] == "file"
    two = [("file", ("a", b"a")), ("file", ("b", b"b"))]
    response = server.post(path, headers=ANN, files=two)
    refused(response, "invalid_value", "Too many files")


@pytest.mark.parametrize("depth", [101, 900, 50_000])
def test_a_deep_body_is_refused_before_anything_reads_it(server: Server, depth: int) -> None:
    """Not a defect after a long recursion."""
    lists, objects = "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth
    for value in (lists, objects):
        for sent in (
            f'{{"messages": [{{"role": "user", "content": "hello", "x": {value}}}]}}',
            f'{{"messages": [], "chat_template_kwargs": {{"enable_thinking": {value}}}}}',
            f'{{"messages": [], "response_format": {value}}}',
        ):
            response = server.post(CHAT, headers=ANN, content=sent)
            refused(response, "invalid_json", "more than 100 lists or objects in each other")


def test_many_brackets_are_not_deep(server: Server) -> None:
    assert chat(server, metadata=[[{}]] * 500).status_code == 200


def test_numbers_and_encodings_that_json_has_not_are_named(server: Server) -> None:
    number = f'{{"messages": {"9" * 5000}}}'
    refused(server.post(CHAT, headers=ANN, content=number), "invalid_json", "too many digits")
    other = json.dumps({"messages": ASK}).encode("utf-16")
    refused(server.post(CHAT, headers=ANN, content=other), "invalid_json", "not UTF-8")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": ASK}),
        (f"{CHAT}/input_tokens", {"messages": ASK}),
        ("/v1/contexts", {"text": "a text"}),
        ("/v1/responses", {"input": "hello"}),
    ],
)
def test_no_template_of_a_request_is_run(server: Server, path: str, fields: Any) -> None:
    """Among the arguments of the template it was run, by all who asked."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    response = server.post(
        path, headers=ANN, json=fields | {"chat_template_kwargs": {"chat_template": loop}}
    )
    refused(response, "unsupported_value", "templates of requests are not run")


def test_a_path_writes_no_line_of_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:
        own = (each for each in caplog.records if each.name.startswith("star_attention"))
        return [each.getMessage() for each in own if "forged" in each.getMessage()]

    with caplog.at_level(logging.INFO):
        server.get("/%0AINFO%20GET%20/forged%20200%1b[31m" + "a" * 500, headers=ANN)
        # A line comes after its answer.
        assert eventually(lambda: bool(lines()))
    (line,) = lines()
    assert line.startswith("GET /%0AINFO%20GET%20/forged%20200%1B%5B31maaa")
    assert len(line) < 400
    assert line.isprintable()


def test_a_long_schema_is_refused(server: Server) -> None:
    schema = {"enum": ["a" * 60 + str(number) for number in range(1100)]}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    refused(chat(server, response_format=wanted), "invalid_value", "characters, more than 65,536")


def test_a_slow_schema_holds_up_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It held up all requests, whosever they were, in the lane of short texts."""
    pytest.importorskip("xgrammar")
    started, goes_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        started.set()
        assert goes_on.wait(20)
        return compile_schema(*arguments)

    monkeypatch.setattr("star_attention.generation.settings.compile_schema", slow)
    wanted = {"response_format": {"type": "json_object"}}
    answers: list[int] = []
    client = threading.Thread(target=lambda: answers.append(chat(server, **wanted).status_code))
    client.start()
    assert started.wait(20)
    assert chat(server).status_code == 200
    assert not answers
    goes_on.set()
    client.join(20)
    assert answers == [200]


def test_files_are_shared_and_count_with_what_they_hold(server: Server) -> None:
    """One key could keep all others from uploading, and nothing counted for empty files."""
    files = Files(100_000, is_shared=lambda: True)

    def add(tenant: str, text: str, nbytes: int) -> None:
        files.add(tenant, "a", text, nbytes=nbytes, purpose="user_data", ttl=None)

    add("ann", "a" * 40_000, 10)
    with pytest.raises(RefusalError, match=r"takes 11,024 bytes, and 41,024 of 50,000 .* your key"):
        add("ann", "", 10_000)
    add("bob", "", 10_000)
    for _ in range(8):
        add("ann", "", 0)
    with pytest.raises(RefusalError, match="files with your key"):
        add("ann", "", 0)
    assert server.service.is_shared


def test_what_comes_back_with_a_response_counts(server: Server) -> None:
    """A thousand responses with long metadata would take all memory."""
    most = server.service.responses
    for _ in range(12):
        body = {"input": "hello", "max_output_tokens": 1, "metadata": {"a": "a" * 300_000}}
        assert server.post("/v1/responses", headers=ANN, json=body).status_code == 200
    assert len(list(most.of_tenant("ann"))) == 5


@pytest.mark.parametrize("form", [True, False])
def test_a_body_that_never_ends_holds_no_place(
    server: Server, monkeypatch: pytest.MonkeyPatch, form: bool
) -> None:
    """Connections of machines that are gone took all places, for ever."""
    monkeypatch.setattr(body, "MOST_BODY_S", 0.2)
    path, kind = (
        ("/v1/files", "multipart/form-data; boundary=x") if form else (CHAT, "application/json")
    )
    head = f"POST {path} HTTP/1.1\nhost: x\nauthorization: Bearer key-ann\ncontent-type: {kind}\n"
    with server.raw(f"{head}content-length: 50\n\n", b"--x\r\n") as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    assert eventually(server.is_idle)


def test_a_body_has_one_length(server: Server) -> None:
    """What follows the shorter one would be a request of its own, past the eyes of a proxy."""
    head = "POST /v1/chat/completions HTTP/1.1\nhost: x\nauthorization: Bearer key-ann\n"
    both = f"{head}content-length: 40\ntransfer-encoding: chunked\n\n"
    hidden = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    with server.raw(both, hidden) as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"send one of them" in answer


@pytest.mark.parametrize("header", ["host", "origin"])
def test_what_is_no_host_is_refused(header: str) -> None:
    """Not a defect, where a server without keys looks at hosts."""
    with running() as server:
        for value in ("http://[::1", "null"):
            response = server.get("/v1/models", headers={header: value})
            assert response.json()["error"]["code"] == "host_not_allowed"
        own = {"host": "[::1]:1", "origin": "http://[::1]:1"}[header]
        assert server.get("/v1/models", headers={header: own}).status_code == 200
