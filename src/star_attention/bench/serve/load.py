"""A process of clients: `python -m star_attention.bench.serve.load`, for `crowd.Crowd`.

It reads lines from stdin: what the clients ask (a `Work`, as JSON), `go`, and, where they go on
without an end, `stop`. It writes `ready` after the first line, and at the end what they heard.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from star_attention.bench.serve.wire import Address, Connection, Heard
from star_attention.errors import StarAttentionError

_AFTER_ERROR_S = 0.1
"""Seconds that a client waits after an error, so that it does not ask in a hot loop."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client, who asks the next question as soon as an answer has ended.

    Attributes:
        questions: bodies of `/v1/completions`.
        leave_after: pieces of text after which it leaves an answer; None to stay.
    """

    questions: list[dict[str, Any]]
    leave_after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the clients of one process do.

    Attributes:
        address: fields of the server's `Address`.
        clients: fields of each `Client`.
        endless: True to begin again after the last question, until told to stop.
    """

    address: dict[str, Any]
    clients: list[dict[str, Any]]
    endless: bool = False


class _Clients:
    """The clients of this process."""

    def __init__(self, work: Work) -> None:
        self._address, self._endless = Address(**work.address), work.endless
        self._clients = [Client(**each) for each in work.clients]
        self.heard: list[Heard] = []

    async def run(self) -> None:
        """Ask, until all have asked everything, or stdin says `stop`."""
        tasks = [asyncio.create_task(self._ask(client)) for client in self._clients]
        if self._endless:
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
            for task in tasks:
                task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            # Faults of this program; what a server refuses is noted.
            if not task.cancelled():
                task.result()

    async def _ask(self, client: Client) -> None:
        connection = Connection(self._address)
        try:
            while True:
                for question in client.questions:
                    heard = Heard(sent=time.monotonic())
                    self.heard.append(heard)
                    try:
                        await connection.ask(question, client.leave_after, heard)
                    except StarAttentionError as error:
                        heard.error = str(error)
                        await asyncio.sleep(_AFTER_ERROR_S)
                if not self._endless:
                    return
        finally:
            connection.close()


def main() -> None:
    """Run the clients of this process."""
    clients = _Clients(Work(**json.loads(sys.stdin.readline())))
    print("ready", flush=True)
    sys.stdin.readline()
    started, before = time.monotonic(), _cpu_s()
    asyncio.run(clients.run())
    spent = {"cpu_s": _cpu_s() - before, "wall_s": time.monotonic() - started}
    print(json.dumps({"heard": [asdict(each) for each in clients.heard], **spent}))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
