"""The server that is measured: a process of its own, or one that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from star_attention.bench.serve.wire import Address, object_of
from star_attention.errors import StarAttentionError

_START_S = 240.0
_LOOK_S = 0.1
_END_S = 20.0


class Server:
    """A server that answers.

    Args:
        address: where it is.
        pid: its process; None if that is unknown.
    """

    def __init__(self, address: Address, pid: int | None = None) -> None:
        self.address, self._pid = address, pid

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON value, or the text, that a request is answered with.

        Raises:
            StarAttentionError: the server refuses, or cannot be reached.
        """
        return asyncio.run(object_of(self.address, method, path, body))

    def keep(self, token_ids: list[int]) -> str:
        """Have a context encoded, and return its id.

        Raises:
            StarAttentionError: it was refused, or has failed.
        """
        body = {"token_ids": token_ids}
        context = self.request("POST", "/v1/contexts?wait=true", body)
        if context["status"] != "ready":
            raise StarAttentionError(f"a context was not encoded: {context}")
        return str(context["id"])

    def drop(self, ids: list[str]) -> None:
        """Delete contexts."""
        for id in ids:
            self.request("DELETE", f"/v1/contexts/{id}")

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.request("GET", "/v1/models")["data"][0]["id"])

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels; 0 if it has none."""
        match = re.search(rf"^star:{name} (\S+)$", self.request("GET", "/metrics"), re.MULTILINE)
        return float(match[1]) if match else 0.0

    def cpu_s(self) -> float | None:
        """Return the seconds that the server has computed, on all cores; None if unknown."""
        try:
            stat = Path(f"/proc/{self._pid}/stat").read_text()
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(options: list[str]) -> Iterator[Server]:
    """Start a server in a process of its own, which ends with the block.

    Args:
        options: of `star-attention serve`, without an address.

    Raises:
        StarAttentionError: it does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "star_attention", "serve", "--quiet", "--port", str(port)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen([*command, *options], stdout=log, stderr=log) as process,
    ):
        try:
            server = Server(Address(host="127.0.0.1", port=port), process.pid)
            if not _is_ready(server, process):
                log.seek(0)
                raise StarAttentionError(f"the server has not started: {log.read()[-1000:]}")
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()


def _is_ready(server: Server, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a server takes requests; False if it ends before, or takes too long."""
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(StarAttentionError):
            server.request("GET", "/ready")
            return True
        time.sleep(_LOOK_S)
    return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
