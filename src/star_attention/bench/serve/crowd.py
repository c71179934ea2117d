"""Clients of a server, spread over processes, and what all of them heard together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise

from star_attention.bench.serve.load import Client, Work
from star_attention.bench.serve.wire import Address, Heard
from star_attention.errors import StarAttentionError

_MODULE = "star_attention.bench.serve.load"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a crowd heard.

    Attributes:
        answers: all answers, also those that were left or failed.
        client_cpu: share of a core that the busiest process of clients used.
    """

    answers: list[Heard]
    client_cpu: float

    @property
    def errors(self) -> list[str]:
        return [each.error for each in self.answers if each.error is not None]

    @property
    def seconds(self) -> float:
        """From the first request to the last text."""
        return self.last - min(each.sent for each in self.answers)

    @property
    def last(self) -> float:
        """Time of the last text."""
        return max(time for each in self.answers for time in each.times)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers over the time that they took together."""
        return sum(each.tokens for each in self.answers) / self.seconds

    @property
    def first_s(self) -> list[float]:
        """Seconds from each request to its first text."""
        return [each.times[0] - each.sent for each in self.answers if each.times]

    def gaps_s(self, start: float | None = None, end: float | None = None) -> list[float]:
        """Return the seconds between the pieces of each answer.

        Args:
            start, end: count gaps that lie between these times, at least in part.
        """
        return [
            later - earlier
            for each in self.answers
            for earlier, later in pairwise(each.times)
            if (start is None or later > start) and (end is None or earlier < end)
        ]


class Crowd:
    """Clients in processes of their own, which wait for `go`.

    Args:
        address: the server.
        clients: what each asks.
        processes: most processes.
        endless: True for clients that ask until `report`.
    """

    def __init__(
        self, address: Address, clients: Sequence[Client], processes: int, *, endless: bool = False
    ) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        for number in range(min(processes, len(clients))):
            own = [asdict(each) for each in clients[number::processes]]
            work = Work(address=asdict(address), clients=own, endless=endless)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", _MODULE],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            self._tell(self._processes[-1], json.dumps(asdict(work)))

    def go(self) -> None:
        """Let the clients ask, once all of them have started."""
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in self._processes:
            self._tell(process, "go")

    def report(self) -> Report:
        """Return what the clients heard, after endless ones were told to stop.

        Raises:
            StarAttentionError: a process has failed.
        """
        outputs = []
        for process in self._processes:
            self._tell(process, "stop")
        for process in self._processes:
            output, errors = process.communicate()
            if process.returncode:
                raise StarAttentionError(f"a process of clients failed: {errors.strip()[-500:]}")
            outputs.append(json.loads(output))
        return Report(
            answers=[Heard(**each) for output in outputs for each in output["heard"]],
            client_cpu=max(output["cpu_s"] / output["wall_s"] for output in outputs),
        )

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    @staticmethod
    def _tell(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            # It has ended; its exit status says how.
            pass


@contextmanager
def crowd(
    address: Address, clients: Sequence[Client], processes: int, *, endless: bool = False
) -> Iterator[Crowd]:
    """Start clients, which wait for `go`, and end what is left of them with the block."""
    own = Crowd(address, clients, processes, endless=endless)
    try:
        yield own
    finally:
        own.close()
