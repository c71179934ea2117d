"""Real clients against the bundled model, each in an environment of its own.

`make test-clients` makes the environments. With `STAR_RECORD=1` what the clients send is written to
`requests.json`, which `tests/unit/test_serve_recorded.py` sends again without them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from star_attention.serve import program
from star_attention.serve.keys import Keys
from star_attention.serve.service import Service
from tests.clients.recording import FILE, KEY, Recorder
from tests.servers import ANSWER, DOCUMENT, NAME, Server, engine, eventually, running
from tests.unit.test_serve_tools import ARGUMENTS, CALLS, server_saying

pytestmark = pytest.mark.clients

FOLDER = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("STAR_CLIENTS", FOLDER.parents[1] / ".venv-clients"))
OTHER_ANSWER = "8081780"
SECOND = ("second", "stream", "stream_later", "message_stream", "sdk_stream")
"""Steps that ask the second question."""
CHUNK_S = 2
"""Seconds after which LangChain gives up without a chunk: 120 by itself."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client, and what it makes of the server's answers.

    Attributes:
        script: `try_….py` or `try_….mjs` of this folder.
        environment: where it is installed; None for a command of the system.
        too_long, wrong_key: types of its errors, or codes in answers that it does not look at.
        contexts: the most contexts that its requests have encoded.
        leaves: False if it cannot leave an answer.
    """

    script: str
    environment: str | None = "newest"
    too_long: str
    wrong_key: str = "AuthenticationError"
    contexts: int = 1
    leaves: bool = True

    @property
    def name(self) -> str:
        return f"{self.script}-2" if self.environment == "openai-2" else self.script


CLIENTS = [
    Client(script="openai", too_long="BadRequestError"),
    Client(script="openai", environment="openai-2", too_long="BadRequestError"),
    Client(script="anthropic", too_long="BadRequestError"),
    Client(script="langchain", too_long="ContextOverflowError"),
    Client(script="llama_index", environment="openai-2", too_long="BadRequestError"),
    Client(script="litellm", too_long="ContextWindowExceededError"),
    Client(script="llm", too_long="BadRequestError", leaves=False),
    Client(
        script="open_webui",
        environment="open-webui",
        too_long="context_length_exceeded",
        wrong_key="this server does not know the API key",
    ),
    Client(script="node", environment="node", too_long="BadRequestError"),
    Client(
        script="curl",
        environment=None,
        too_long="context_length_exceeded",
        wrong_key="invalid_api_key",
    ),
]


def command_of(client: Client) -> list[str]:
    """Return the command that runs a client's script, or skip the test."""
    command, script = [sys.executable], f"try_{client.script}.py"
    if client.environment in (None, "node"):
        if shutil.which(client.script) is None:
            pytest.skip(f"there is no {client.script} on this machine")
    else:
        command = [str(ENVIRONMENTS / client.environment / "bin" / "python")]
    if client.environment == "node":
        command, script = ["node"], "try_node.mjs"
    if client.environment and not (ENVIRONMENTS / client.environment).exists():
        pytest.skip("`make test-clients` makes the clients' environments")
    return [*command, script]


def results_of(client: Client, server: Server, folder: Path, **variables: str) -> dict[str, Any]:
    """Return what a client's script says, with these variables of its environment."""
    document = folder / "book.txt"
    document.write_text(DOCUMENT, encoding="utf-8")
    settings = {
        "URL": server.url,
        "KEY": KEY,
        "MODEL": NAME,
        "DOCUMENT": str(document),
        "NODE": str(ENVIRONMENTS / "node"),
    }
    done = subprocess.run(
        command_of(client),
        cwd=FOLDER,
        env=os.environ
        | {f"STAR_{name}": value for name, value in settings.items()}
        | {"PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_client(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders: list[Recorder] = []
    make_app = program.make_app

    def recorded(*arguments: Any) -> Recorder:
        recorders.append(Recorder(make_app(*arguments)))
        return recorders[0]

    monkeypatch.setattr(program, "make_app", recorded)
    with running(engine(), keys=Keys.of({KEY: "ann"})) as server:
        results = results_of(client, server, tmp_path)
        assert results.pop("models", [NAME]) == [NAME]
        assert client.too_long in str(results.pop("too_long"))
        assert client.wrong_key in str(results.pop("wrong_key"))
        assert results.pop("left", None) is (True if client.leaves else None)
        assert eventually(server.is_idle)
        phases = ("encode", "decode")
        aborted = sum(server.metric("request_aborted_total", phase=phase) for phase in phases)
        assert aborted == client.leaves
        encoded = server.metric("encodes_total", outcome="done")
        assert 1 <= encoded <= client.contexts
        assert server.metric("prefix_cache_hits_total") > 700
    check_answers(results)
    if "STAR_RECORD" in os.environ:
        write(client, results["version"], recorders[0].requests)


def test_langchain_waits_for_a_document(tmp_path: Path) -> None:
    """Forbids that a client gives up whose clock counts chunks, but no comments."""
    langchain = next(client for client in CLIENTS if client.script == "langchain")

    def slow(service: Service) -> None:
        encode = service.engine.batch.encode

        def encoding(*arguments: Any, **options: Any) -> Any:
            time.sleep(3 * CHUNK_S)
            return encode(*arguments, **options)

        service.engine.batch.encode = encoding  # type: ignore[method-assign]

    with running(
        engine(), keys=Keys.of({KEY: "ann"}), before=slow, heartbeat=CHUNK_S / 4
    ) as server:
        results = results_of(
            langchain,
            server,
            tmp_path,
            LANGCHAIN_OPENAI_STREAM_CHUNK_TIMEOUT_S=str(CHUNK_S),
            STAR_STEPS="stream_later",
        )
    assert OTHER_ANSWER in results["stream_later"]["text"]


@pytest.mark.parametrize("family", CALLS)
def test_tools(family: str, tmp_path: Path) -> None:
    """Forbids calls that clients cannot put together, and prompts that cannot have them."""
    client = Client(script="tools", too_long="")
    said = f"Let me see.\n{CALLS[family]}"
    with server_saying(said, family, keys=Keys.of({KEY: "ann"})) as server:
        results = results_of(client, server, tmp_path)
    assert results.pop("litellm") == [ARGUMENTS]
    assert list(results) == ["anthropic", "langchain", "responses"]
    assert all(result == [ARGUMENTS] * 2 for result in results.values()), results


def check_answers(results: dict[str, Any]) -> None:
    """Check that answers are there, and that all but the first came from a kept document."""
    assert results.pop("document")["text"].endswith(ANSWER)
    assert results.pop("stopped", "stop_sequence") == "stop_sequence"
    for step, result in results.items():
        if step.startswith(("too_long", "wrong_model")):
            assert "Error" in str(result["error"]), step
        elif isinstance(result, dict):
            assert (OTHER_ANSWER if step in SECOND else ANSWER) in result["text"], step
            assert result.get("cached", 700) > 500, step


def write(client: Client, version: Any, requests: list[dict[str, Any]]) -> None:
    """Write down what a client has sent, in the place of what it sent before."""
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    recorded[client.name] = {"version": version, "requests": requests}
    text = json.dumps(dict(sorted(recorded.items())), indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
