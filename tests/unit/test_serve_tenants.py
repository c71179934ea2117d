"""Keys: who gets in, and that nothing of one tenant reaches another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from star_attention.errors import InvalidInputError
from star_attention.serve.keys import Keys
from star_attention.serve.settings import ServeSettings
from tests.servers import ASK, NAME, Server, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    digest = hashlib.sha256(b"key-of-bob").hexdigest()
    path.write_text(f"# who may\nann:key-of-ann\nann:another:of-ann\n\nbob:sha256:{digest}\n")
    with running(keys=Keys.read(str(path))) as server:
        yield server


def test_the_client_with_and_without_a_key(server: Server) -> None:
    for key in ("key-of-ann", "another:of-ann", "key-of-bob"):
        with server.client(key) as client:
            assert client.models.list().data[0].id == NAME
    for key in ("key-of-eve", "ann", f"sha256:{hashlib.sha256(b'key-of-bob').hexdigest()}"):
        with server.client(key) as client, pytest.raises(openai.AuthenticationError) as error:
            client.chat.completions.create(model=NAME, messages=ASK)
        assert error.value.code == "invalid_api_key"
        assert key not in error.value.message


def test_the_other_header(server: Server) -> None:
    assert server.get("/v1/models", headers={"x-api-key": "key-of-ann"}).status_code == 200
    assert server.get("/v1/models", headers={"x-api-key": "no"}).status_code == 401


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/files", "/v1/contexts", "/version", "/metrics", "/nowhere"]
)
def test_all_else_needs_a_key(server: Server, path: str) -> None:
    """Forbids a route that somebody adds and forgets to protect."""
    response = server.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "the API key is missing" in response.json()["error"]["message"]
    for header in ("key-of-ann", "Bearer", "Token key-of-ann"):
        response = server.get(path, headers={"authorization": header})
        assert response.status_code == 401
        message = response.json()["error"]["message"]
        assert message.startswith("the header Authorization has no key after the word Bearer;")


def test_health_needs_none(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ok"}


def test_metrics_may_be_public() -> None:
    keys = Keys([(hashlib.sha256(b"k").digest(), "ann")])
    with running(keys=keys, public_metrics=True) as server:
        assert "star:num_requests_running 0.0" in server.get("/metrics").text
        assert server.get("/version").status_code == 401


def test_files_of_another_tenant(server: Server) -> None:
    with server.client("key-of-ann") as ann, server.client("key-of-bob") as bob:
        file = ann.files.create(file=("notes.txt", b"The hill is tall."), purpose="user_data")
        assert (file.filename, file.bytes, file.status) == ("notes.txt", 17, "processed")
        assert ann.files.retrieve(file.id) == file
        assert ann.files.content(file.id).text == "The hill is tall."
        assert [each.id for each in ann.files.list()] == [file.id]
        assert list(bob.files.list()) == []
        for call in (bob.files.retrieve, bob.files.delete, bob.files.content):
            with pytest.raises(openai.NotFoundError):
                call(file.id)
        with server.client("another:of-ann") as same:
            assert same.files.retrieve(file.id) == file
        assert ann.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            ann.files.retrieve(file.id)


def test_files_that_are_no_texts(server: Server) -> None:
    with server.client("key-of-ann") as client:
        with pytest.raises(openai.BadRequestError, match="a PNG"):
            client.files.create(
                file=("a.txt", b"\x89PNG\r\n\x1a\n" + bytes(99)), purpose="user_data"
            )
        with pytest.raises(openai.BadRequestError, match="UTF-8"):
            client.files.create(file=("a.txt", b"caf\xe9 au lait"), purpose="user_data")
    headers = {"authorization": "Bearer key-of-ann"}
    response = server.post("/v1/files", headers=headers, files={"other": b"text"})
    assert response.status_code == 400
    assert "the form has no file" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys; write lines of name:key"),
        ("only-a-name\n", "line 1: expected name:key"),
        ("ok:key\n: key\n", "line 2: expected name:key"),
        ("a b:key\n", "line 1"),
        ("a:\n", "line 1"),
    ],
)
def test_files_of_keys_that_have_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message) as error:
        Keys.read(str(path))
    assert "key\n" not in str(error.value)


def test_a_missing_file_of_keys(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read: "):
        Keys.read(str(tmp_path / "none"))


def test_other_machines_need_keys() -> None:
    with pytest.raises(InvalidInputError, match=r"host '0\.0\.0\.0' can be reached from other"):
        ServeSettings(host="0.0.0.0")
    assert ServeSettings(host="0.0.0.0", keys="keys").keys == "keys"
    assert ServeSettings(host="0.0.0.0", insecure=True).insecure
    for host in ("127.0.0.1", "::1", "localhost"):
        assert ServeSettings(host=host).host == host


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_body": "many"}, "max_body 'many' is not a size; write 4096, '64k', '64m' or '8g'"),
        ({"max_rows": 0}, "max_rows: expected 1 or more, got 0"),
        ({"port": 70_000}, "port: expected 0 to 65535, got 70000"),
        ({"request_timeout": -1.0}, "request_timeout: expected .* above 0, got -1"),
        # Zero would be no time at all, and not no limit.
        ({"request_timeout": 0}, "request_timeout: .* above 0, got 0; leave it out for no limit"),
        ({"context_ttl": 0.0}, "expected a number of seconds above 0, got 0; leave it out for no"),
        ({"keepalive": 0.0}, "keepalive: expected a number of seconds above 0, got 0$"),
        ({"heartbeat": 0}, "heartbeat: expected .*, got 0"),
        ({"engine_stall": 0}, "engine_stall: expected .*, got 0"),
        ({"drain_timeout": -1}, "drain_timeout: expected .* 0 or more, got -1"),
        ({"heartbeat": float("nan")}, "heartbeat: expected .*, got nan"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ServeSettings.of(**values)
    assert ServeSettings.of(max_body="64k", max_rows=None).max_body == 65536
