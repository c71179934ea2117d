"""A hundred clients with three keys: nothing is lost, nothing is left, nothing meets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")
pytest.importorskip("httpx")

import httpx

from star_attention.serve.keys import Keys
from tests.command_line import NEEDLE, NOISE, OTHER, QUESTION
from tests.engines import BUNDLED
from tests.servers import eventually, running
from tests.visitors import Tenant, ask_alone, visit

_WARM_S, _LONG_S, _WAIT_S = 30.0, 60.0, 120.0
_IDLE = ("num_requests_running", "num_requests_waiting", "num_requests_open")


def three_tenants() -> list[Tenant]:
    """Each has a document of its own, and one that all have."""
    return [
        Tenant(name, f"key-of-{name}", [NOISE * (2 + number) + NEEDLE, OTHER + NOISE * 4])
        for number, name in enumerate(("ann", "bob", "cat"))
    ]


def test_a_few_clients_for_a_moment() -> None:
    tenants = three_tenants()
    keys = Keys.of({each.key: each.name for each in tenants})
    with running(keys=keys, max_rows=4, max_waiting=12) as server:
        for tenant in tenants:
            # A hit would tell that another one has asked the document that all have.
            assert asyncio.run(ask_alone(server.url, tenant, QUESTION)) == ["miss", "miss"]
        asyncio.run(visit(server.url, tenants, QUESTION, visitors=9, seconds=1))
        assert eventually(server.is_idle)


class Process:
    """A server in a process of its own, and what the machine says of it."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self._proc = url, Path(f"/proc/{pid}")

    def metric(self, name: str) -> float:
        headers = {"authorization": "Bearer key-of-ann"}
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=_WAIT_S).text
        return sum(
            float(value) for value in re.findall(rf"^star:{name}(?:{{.*}})? (\S+)$", text, re.M)
        )

    def is_idle(self) -> bool:
        return not any(self.metric(name) for name in _IDLE)

    @property
    def descriptors(self) -> int:
        return len(os.listdir(self._proc / "fd"))

    @property
    def threads(self) -> int:
        return len(os.listdir(self._proc / "task"))

    @property
    def megabytes(self) -> float:
        status = (self._proc / "status").read_text()
        match = re.search(r"VmRSS:\s+(\d+)", status)
        assert match
        return int(match[1]) / 1024

    def forget_all(self, tenants: list[Tenant]) -> None:
        for tenant in tenants:
            headers = {"authorization": f"Bearer {tenant.key}"}
            with httpx.Client(base_url=self.url, headers=headers, timeout=_WAIT_S) as client:
                while contexts := client.get("/v1/contexts?limit=1000").json()["data"]:
                    for context in contexts:
                        client.delete(f"/v1/contexts/{context['id']}")


@contextlib.contextmanager
def served(folder: Path, tenants: list[Tenant]) -> Iterator[Process]:
    """Serve the bundled model with a little memory, so that contexts have to move."""
    keys = folder / "keys"
    keys.write_text("".join(f"{each.name}:{each.key}\n" for each in tenants))
    command = [sys.executable, "-m", "star_attention", "serve", "-m", str(BUNDLED), "--port", "0"]
    options = ["--block-size", "256", "--dtype", "float32", "--keys", str(keys)]
    options += ["--store", str(folder / "store"), "--max-store-bytes", "64m"]
    options += ["--max-context-bytes", "48m", "--max-rows", "16", "--max-waiting", "90"]
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen([*command, *options], stderr=errors) as process,
    ):
        try:
            assert eventually(lambda: "serving" in log.read_text(), _WAIT_S), log.read_text()
            url = re.search(r"http://127.0.0.1:\d+", log.read_text())
            assert url
            yield Process(url[0], process.pid)
        except BaseException:
            process.kill()
            raise
        process.send_signal(signal.SIGTERM)
        assert process.wait(_WAIT_S) == 0
    lines = log.read_text()
    assert " 500 " not in lines, lines[-3000:]
    assert "failed with" not in lines, lines[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_hundred_clients_for_two_minutes(tmp_path: Path) -> None:
    tenants = three_tenants()
    with served(tmp_path, tenants) as server:
        for tenant in tenants:
            assert asyncio.run(ask_alone(server.url, tenant, QUESTION)) == ["miss", "miss"]
        sizes = []
        for seconds in (_WARM_S, _LONG_S, _LONG_S):
            asyncio.run(visit(server.url, tenants, QUESTION, visitors=100, seconds=seconds))
            assert eventually(server.is_idle, _WAIT_S)
            server.forget_all(tenants)
            assert eventually(lambda: server.metric("contexts") == 0, _WAIT_S)
            # Connections that were left end by themselves.
            time.sleep(2)
            sizes.append((server.descriptors, server.threads, server.megabytes))
        # A slow machine is not warm yet at the first one.
        _, (descriptors, threads, megabytes), after = sizes
        assert after[0] <= descriptors + 2
        # asyncio's own pool grows up to so many, as they are needed.
        assert after[1] <= threads + min(32, (os.cpu_count() or 1) + 4)
        assert after[2] <= megabytes * 1.1, sizes
        print(sizes, [tenant.visits for tenant in tenants])
        assert all(len(tenant.visits) == 10 for tenant in tenants), "each did everything"
