"""`star-attention serve` on several ranks: rank 0 serves, and the others follow it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from star_attention import StarLLM  # noqa: E402
from star_attention.distributed import SoloComm, TorchComm  # noqa: E402
from tests.command_line import NEEDLE, NOISE, QUESTION  # noqa: E402
from tests.dist.pool import Pool  # noqa: E402
from tests.dist.test_command_line import TORCHRUN  # noqa: E402
from tests.engines import BUNDLED, bundled_tokenizer, text_model  # noqa: E402
from tests.servers import running  # noqa: E402

DOCUMENT = NOISE * 12 + NEEDLE + NOISE * 8
OPTIONS = ["--block-size", "256", "--dtype", "float32", "--min-context-tokens", "64"]
CHAT = "/v1/chat/completions"
_WAIT_S = 60.0


class Served:
    """The ranks of a server.

    Args:
        processes: one for each rank.
        logs: what each of them says.

    Attributes:
        client: asks rank 0.
    """

    client: Any

    def __init__(self, processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
        self.processes, self._logs = processes, logs

    @property
    def said(self) -> list[str]:
        """What each rank has said so far."""
        return [log.read_text(encoding="utf-8") for log in self._logs]

    def wait_for_url(self) -> str:
        deadline = time.monotonic() + _WAIT_S
        while "serving" not in self.said[0]:
            assert time.monotonic() < deadline, self.said
            assert all(process.poll() is None for process in self.processes), self.said
            time.sleep(0.05)
        return self.said[0].partition(" at ")[2].partition("/v1")[0]

    def ask(self, id: str, question: str = QUESTION, **fields: Any) -> str:
        response = self.client.post(CHAT, json=body(id, question, **fields))
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    def add(self, text: str) -> str:
        response = self.client.post("/v1/contexts?wait=true", json={"text": text})
        assert response.status_code in (200, 201), response.text
        id: str = response.json()["id"]
        return id

    def stream(self, id: str, **fields: Any) -> Iterator[str]:
        """Yield the lines of an answer that have something in them."""
        asked = body(id, stream=True, **fields)
        with self.client.stream("POST", CHAT, json=asked) as response:
            yield from filter(None, response.iter_lines())

    def encodes(self) -> float:
        """Return how many contexts were encoded."""
        lines = self.client.get("/metrics").text.splitlines()
        counts = [line for line in lines if line.startswith('star:encodes_total{outcome="done"}')]
        return float(counts[0].split()[-1]) if counts else 0.0

    def signal_all(self, number: signal.Signals) -> None:
        """Send all ranks a signal, as a launcher does."""
        for process in self.processes:
            process.send_signal(number)

    def end(self) -> list[int]:
        """Return the ranks' exit statuses."""
        deadline = time.monotonic() + _WAIT_S
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]


def body(id: str, question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"context": id, "messages": messages, "max_tokens": 24, **fields}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def served(folder: Path, ranks: int, *options: str) -> Iterator[Served]:
    """Start the command on each rank, and kill all at the end.

    Args:
        folder: where they write what they say.
        ranks: number of ranks; 1 for a single process.
        options: further options of `serve`; RANK in them stands for the rank.
    """
    command = [sys.executable, "-m", "star_attention", "serve", "-m", str(BUNDLED), "--port", "0"]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")
    logs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        own = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        with open(log, "w", encoding="utf-8") as stderr:
            processes.append(
                subprocess.Popen(
                    [*command, *OPTIONS, *(each.replace("RANK", str(rank)) for each in options)],
                    env=os.environ | shared | own,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            )
    server = Served(processes, logs)
    try:
        with httpx.Client(base_url=server.wait_for_url(), timeout=_WAIT_S) as server.client:
            yield server
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def use(server: Served) -> list[Any]:
    """Ask two contexts in every way; return the answers."""
    first, second = server.add(DOCUMENT), server.add(NOISE * 30)
    answers: list[Any] = [server.ask(first), server.ask(second), server.ask(first, "What is hot?")]
    together: list[Any] = [None] * 6

    def ask(number: int) -> None:
        question = f"What is number {number}?"
        together[number] = server.ask((first, second)[number % 2], question, seed=number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers += together
    lines = [*server.stream(first)]
    answers.append([line.partition('"delta"')[2] for line in lines])
    extended = server.client.post(f"/v1/contexts/{first}/extend", json={"text": NOISE})
    answers.append(extended.status_code)
    return answers


def serve_in_the_pool(comm: TorchComm) -> Any:
    """Serve a small model on rank 0; return answers with and without kept contexts."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=64, anchor_size=64)
    if star.rank > 0:
        star.follow()
        return None
    try:
        with running(star) as server:
            made = server.post("/v1/contexts?wait=true", json={"text": DOCUMENT})
            asked = body(made.json()["id"], max_tokens=8)
            answers = [server.post(CHAT, json=asked).json() for _ in range(2)]
            answers.append(
                server.post(CHAT, json=body("", max_tokens=8) | {"context": None}).json()
            )
            assert server.get("/health").status_code == 200
            chat = body("", NOISE + QUESTION, max_tokens=8) | {"context": None}
            answers.append(server.post(CHAT, json=chat).json())
            said = answers[-1]["choices"][0]["message"]
            more = {"role": "user", "content": "What is hot?"}
            chat["messages"] = [*chat["messages"], said, more]
            response = server.post(CHAT, json=chat)
            # Each rank goes on with what it has kept of the first turn.
            assert int(response.headers["x-star-conversation-tokens"]) > 32
            answers.append(response.json())
            return [(each["choices"][0]["message"], each["usage"]) for each in answers]
    finally:
        star.close()


def test_a_server_on_ranks_that_follow(pool: Pool) -> None:
    answers, _ = pool.run(serve_in_the_pool, 2)
    assert answers == serve_in_the_pool(SoloComm())


@pytest.mark.slow
def test_ranks_answer_as_one_process(tmp_path: Path) -> None:
    with served(tmp_path, 1) as server:
        expected = use(server)
    with served(tmp_path, 2) as server:
        assert use(server) == expected
        assert server.client.get("/health").status_code == 200
        server.signal_all(signal.SIGTERM)
        assert server.end() == [0, 0], server.said


STALL_S = 4.0
QUICK_TO_NOTICE = ["--stall-limit", str(STALL_S)]


@pytest.mark.slow
def test_idle_longer_than_the_stall_limit_and_ended_while_it_answers(tmp_path: Path) -> None:
    """A signal to all ranks lets the answer end, and the ranks with 0."""
    with served(tmp_path, 3, *QUICK_TO_NOTICE) as server:
        id = server.add(DOCUMENT)
        expected = server.ask(id)
        time.sleep(STALL_S + 3)
        assert server.ask(id) == expected
        lines = server.stream(id, max_tokens=200, ignore_eos=True)
        next(lines)
        server.signal_all(signal.SIGTERM)
        assert [*lines][-1] == "data: [DONE]"
        assert server.end() == [0, 0, 0], server.said


@pytest.mark.slow
def test_a_rank_that_is_lost_in_an_answer(tmp_path: Path) -> None:
    with served(tmp_path, 2, *QUICK_TO_NOTICE) as server:
        id = server.add(DOCUMENT)
        lines = server.stream(id, max_tokens=3000, ignore_eos=True)
        next(lines)
        server.processes[1].kill()
        rest = [*lines]
        assert any('"error"' in line for line in rest), rest[-3:]
        assert server.end() == [1, -signal.SIGKILL]
        assert "rank 1" in server.said[0].splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_while_all_are_idle(tmp_path: Path, how: signal.Signals) -> None:
    """The server ends by itself, without a request that would notice."""
    with served(tmp_path, 2, *QUICK_TO_NOTICE) as server:
        server.ask(server.add(DOCUMENT))
        server.processes[1].send_signal(how)
        started, unwell = time.monotonic(), set()
        while server.processes[0].poll() is None:
            assert time.monotonic() < started + STALL_S + _WAIT_S
            with contextlib.suppress(httpx.HTTPError):
                unwell.add(server.client.get("/health").status_code)
            time.sleep(0.01)
        assert unwell <= {200, 503}
        assert server.processes[0].poll() == 1
        assert "RankError" in server.said[0] or "rank 1 failed" in server.said[0]


@pytest.mark.slow
def test_a_launcher_that_ends_the_others_of_a_lost_rank(tmp_path: Path) -> None:
    """Forbids that such a server ends with 0, as if it had been asked to."""
    with served(tmp_path, 2) as server:
        server.ask(server.add(DOCUMENT))
        server.processes[1].kill()
        server.processes[0].send_signal(signal.SIGTERM)
        assert server.end() == [1, -signal.SIGKILL], server.said
        assert "rank 1 failed" in server.said[0]


@pytest.mark.slow
def test_the_store_of_several_ranks(tmp_path: Path) -> None:
    """Contexts come back on as many ranks and on fewer; a damaged part is encoded again."""
    store = tmp_path / "store"
    options = ["--store", str(store)]
    with served(tmp_path, 2, *options) as server:
        id = server.add(DOCUMENT)
        expected = server.ask(id)
        server.signal_all(signal.SIGTERM)
        assert server.end() == [0, 0], server.said
    (folder,) = store.glob("*/*.star")
    assert folder.is_dir()
    for ranks in (2, 1):
        with served(tmp_path, ranks, *options) as server:
            assert server.ask(id) == expected
            assert server.encodes() == 0
    part = folder / "rank-1.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with served(tmp_path, 2, *options) as server:
        assert server.ask(id) == expected
        assert server.encodes() == 1
        assert len([*store.glob("aside/*.star")]) == 1
        server.client.delete(f"/v1/contexts/{id}")
        server.signal_all(signal.SIGTERM)
        assert server.end() == [0, 0], server.said
    assert [*store.glob("*/ctx_*")] == []


@pytest.mark.slow
def test_ranks_with_other_options_are_refused(tmp_path: Path) -> None:
    """Each rank reads a file of settings of its own."""
    for rank, rows in enumerate((5, 6)):
        (tmp_path / f"{rank}.toml").write_text(f"max-rows = {rows}\n")
    with (
        pytest.raises(AssertionError, match="rank 1 was started with another max_rows than rank 0"),
        served(tmp_path, 2, "--config", str(tmp_path / "RANK.toml")),
    ):
        pass


@pytest.mark.slow
def test_torchrun_starts_and_ends_a_server(tmp_path: Path) -> None:
    command = [sys.executable, *TORCHRUN, "-m", "star_attention", "serve", "-m", str(BUNDLED)]
    command += ["--port", "0"]
    log = tmp_path / "log.txt"
    with open(log, "w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
    server = Served([process], [log])
    try:
        with httpx.Client(base_url=server.wait_for_url(), timeout=_WAIT_S) as server.client:
            assert server.ask(server.add(DOCUMENT))
            process.send_signal(signal.SIGTERM)
            process.wait(_WAIT_S)
    finally:
        process.kill()
    assert "shutting down: 0 requests are open" in log.read_text()
    assert "error:" not in log.read_text().partition("torch/distributed")[0]
