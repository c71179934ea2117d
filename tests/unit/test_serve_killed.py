"""`star-attention serve` with a store, killed and started again, with the bundled model."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")

from tests.command_line import NEEDLE, NOISE, QUESTION  # noqa: E402
from tests.engines import BUNDLED  # noqa: E402

DOCUMENT = NOISE * 12 + NEEDLE + NOISE * 8
_WAIT_S = 90


@contextlib.contextmanager
def served(store: Path) -> Iterator[Any]:
    """Start the command on a free port; yield what asks it, and kill it."""
    command = [sys.executable, "-m", "star_attention", "serve", "-m", str(BUNDLED), "--port", "0"]
    options = ["--store", str(store), "--block-size", "256", "--dtype", "float32"]
    with subprocess.Popen(
        command + options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if "serving" in line)
        url = line.partition(" at ")[2].partition("/v1")[0]
        try:
            with httpx.Client(base_url=url, timeout=_WAIT_S) as client:
                yield client
        finally:
            process.send_signal(signal.SIGKILL)


def ask(client: Any, id: str) -> str:
    body = {"context": id, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def encodes(client: Any) -> float:
    lines = client.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith('star:encodes_total{outcome="done"}')]
    return float(counts[0].split()[-1]) if counts else 0.0


@pytest.mark.slow
def test_a_kept_context_is_there_after_a_kill_and_after_damage(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with served(store) as client:
        made = client.post("/v1/contexts?wait=true", json={"text": DOCUMENT, "name": "noise"})
        id = made.json()["id"]
        expected = ask(client, id)
        assert encodes(client) == 1
        deadline = time.monotonic() + _WAIT_S
        while not list(store.glob("*/*.json")):
            assert time.monotonic() < deadline, "the context is not written"
            time.sleep(0.05)
    with served(store) as client:
        assert client.get(f"/v1/contexts/{id}").json()["name"] == "noise"
        assert ask(client, id) == expected
        assert encodes(client) == 0
    (path,) = store.glob("*/*.star")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with served(store) as client:
        assert ask(client, id) == expected
        assert encodes(client) == 1
        assert len(list((store / "aside").iterdir())) == 1
