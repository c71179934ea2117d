"""The command `serve`: its options, its file of settings, and what it refuses before it starts."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.cli import serving
from star_attention.errors import InvalidInputError
from star_attention.planning.calibration import Calibration, Lookback
from star_attention.runtime import model_facts
from star_attention.serve.listening import bind
from tests.command_line import MODEL, failed, ok, run

pytest.importorskip("starlette")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what would be served, instead of serving it."""
    calls: list[Any] = []
    monkeypatch.setattr(serving, "serve", lambda *arguments: calls.append(arguments))
    return calls


def test_options_become_settings(served: list[Any]) -> None:
    ok(
        "serve",
        *MODEL,
        "--max-body",
        "2m",
        "--no-implicit",
        "--max-rows",
        "3",
        "--store",
        "x",
        "--block-size",
        "1k",
        "--allowed-hosts",
        "a",
        "--allowed-hosts",
        "b",
    )
    ((model, settings, star_settings, _),) = served
    assert model.model == str(MODEL[1])
    assert settings.max_body == 2 * 2**20
    assert (settings.implicit, settings.max_rows, settings.store) == (False, 3, "x")
    assert settings.allowed_hosts == ("a", "b")
    assert star_settings["block_size"] == "1k"


def test_a_calibration_is_the_engine_s(served: list[Any], tmp_path: Path) -> None:
    facts = model_facts(StarLLM.from_pretrained(MODEL[1], device="cpu").runtime)
    found = Lookback(lookback=2, lookback_layers="3-7")
    path = tmp_path / "calibration.json"
    Calibration(model=facts, settings={"balanced": found, "high": found}).write(path)
    ok("serve", *MODEL, "--device", "cpu", "--calibration", path)
    ((model, _, star_settings, status),) = served
    config = serving.load(model, status, star_settings).config
    assert (config.lookback, config.lookback_layers) == (2, "3-7")
    served.clear()
    ok("serve", "--shapes", "smollm2-135m", "--calibration", path)
    ((model, _, star_settings, status),) = served
    with pytest.raises(InvalidInputError, match="--shapes has random weights; leave out"):
        serving.load(model, status, star_settings)


def test_a_file_of_settings(served: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(
        f'model = "{MODEL[1]}"\nmax-rows = 5\nmax_waiting = 7\nimplicit = false\n'
        'block-size = "2k"\nmax-body = "3m"\n'
    )
    ok("serve", "--config", path, "--max-rows", "6")
    ((model, settings, star_settings, _),) = served
    assert model.model == str(MODEL[1])
    assert (settings.max_rows, settings.max_waiting) == (6, 7)
    assert (settings.implicit, settings.max_body) == (False, 3 * 2**20)
    assert star_settings["block_size"] == "2k"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-rowz = 5", "serve has no option --max-rowz"),
        ("no-implicit = true", "no option --no-implicit in a file; give implicit = false"),
        ('config = "more.toml"', "a file of settings names no other one; leave config out"),
        ("max-rows =", "cannot be read: "),
        ("max-rows = 0", "--max-rows"),
    ],
)
def test_a_file_of_settings_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    done = run("serve", *MODEL, "--config", path)
    assert done.status == 2
    assert message in " ".join(done.err.replace("│", " ").split())


def test_what_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    assert "host '0.0.0.0' can be reached" in failed("serve", *MODEL, "--host", "0.0.0.0")
    assert "cannot be read" in failed("serve", *MODEL, "--keys", tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = failed("serve", *MODEL, "--port", str(port))
    assert f"cannot listen on 127.0.0.1 port {port}: " in error
    assert "give another --port or --host" in error


@pytest.mark.parametrize("command", [["serve"], ["bench", "serve"]])
def test_a_package_that_is_missing(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *arguments: Any) -> Any:
        return None if name == "prometheus_client" else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    error = failed(*command, *MODEL)
    assert "serve needs the package prometheus-client" in error
    assert "pip install 'star-attention[serve]'" in error


def test_answers_wait_for_no_acknowledgment() -> None:
    """Forbids 40 ms between an answer's head and its body, which Nagle's algorithm makes of a
    socket that asyncio does not know to be TCP."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
