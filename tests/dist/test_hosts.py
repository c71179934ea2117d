"""Two hosts as network namespaces, joined by a cable that is cut in the middle of the work.

torchrun's own rendezvous runs between them. Needs root, because it makes network namespaces; run by
`make test-slow`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from star_attention import StarLLM
from tests.engines import BUNDLED

STALL_S = 5
FAULTY = Path(__file__).with_name("faulty.py")
HOSTS = ("10.77.0.1", "10.77.0.2")
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_ROOT or shutil.which("ip") is None, reason="needs root and iproute2"),
]


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[None]:
    names = [f"star-test-{host}" for host in range(2)]
    try:
        for name in names:
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        ip(f"link add star0 netns {names[0]} type veth peer name star1 netns {names[1]}")
        for host, name in enumerate(names):
            ip(f"-n {name} addr add {HOSTS[host]}/24 dev star{host}")
            ip(f"-n {name} link set star{host} up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def generate(tmp_path: Path, fault: str) -> list[str]:
    """Return the arguments of a command."""
    text = tmp_path / "book.txt"
    text.write_text("The tea is hot and the cup is blue.\n" * 200)
    command = ["generate", "-m", str(BUNDLED), "--dtype", "float32", "--json"]
    command += ["--block-size", "256", "--tokens-per-forward", "256"]
    command += ["--stall-limit", str(STALL_S), str(text), "--query", "x", "--ignore-eos"]
    return [*command, "--max-new-tokens", "8" if fault == "none" else "400"]


def launch(
    tmp_path: Path, fault: str, phase: int | str, *session: str
) -> list[subprocess.Popen[bytes]]:
    """Run a command on both hosts, or a session that rank 0 leads."""
    arguments = session or generate(tmp_path, fault)
    processes = []
    for host, address in enumerate(HOSTS):
        command = ["ip", "netns", "exec", f"star-test-{host}"]
        command += [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id"]
        command += [fault, "--rdzv-endpoint", f"{HOSTS[0]}:29500"]
        command += ["--rdzv-conf", f"is_host={1 - host}", "--local-addr", address]
        command += [str(FAULTY), fault, str(phase), "0", *arguments]
        environment = dict(
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            GLOO_SOCKET_IFNAME=f"star{host}",
            FAULT_TIME=str(tmp_path / "fault"),
        )
        with (
            open(tmp_path / f"out-{host}", "wb") as stdout,
            open(tmp_path / f"err-{host}", "wb") as stderr,
        ):
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=stdout,
                    stderr=stderr,
                    env=os.environ | environment,
                    start_new_session=True,
                )
            )
    return processes


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_hosts_answer_as_one_process(tmp_path: Path, cable: None) -> None:
    processes = launch(tmp_path, "none", 1)
    try:
        statuses = [process.wait(timeout=90) for process in processes]
    finally:
        end(processes)
    assert statuses == [0, 0], (tmp_path / "err-0").read_text()[-3000:]
    reply = json.loads((tmp_path / "out-0").read_text())
    assert (tmp_path / "out-1").read_text() == "", "rank 0 speaks for all"
    star = StarLLM.from_pretrained(BUNDLED, dtype="float32", block_size=256)
    context = star.encode((tmp_path / "book.txt").read_text())
    expected = star.generate(context, "x", max_new_tokens=8, ignore_eos=True)
    assert reply["token_ids"] == expected.token_ids
    assert reply["ranks"] == 2


def wait_for(text: str, file: Path, timeout_s: float) -> float:
    """Return the time at which the file contains the text."""
    deadline = time.monotonic() + timeout_s
    while text not in (file.read_text() if file.exists() else ""):
        assert time.monotonic() < deadline, (
            f"{text!r} is not in {file.name}: {file.read_text()[-2000:]}"
        )
        time.sleep(0.05)
    return time.monotonic()


@pytest.mark.parametrize("phase", [1, 2])
def test_a_cut_cable_stops_both_hosts(tmp_path: Path, cable: None, phase: int) -> None:
    """Each end names the other rank. torchrun's agents may notice later: the test ends them."""
    processes = launch(tmp_path, "slow" if phase == 1 else "crawling", phase)
    try:
        if phase == 1:
            wait_for("encoded: rank 0 256", tmp_path / "err-0", 60)
        else:
            wait_for("answering", tmp_path / "fault", 60)
            time.sleep(2)
        ip("-n star-test-0 link set star0 down")
        cut_at = time.monotonic()
        seconds = [
            wait_for(f"rank {host}: error: ", tmp_path / f"err-{host}", 3 * STALL_S) - cut_at
            for host in range(2)
        ]
    finally:
        end(processes)
    print(f"phase {phase}: the hosts stopped after {seconds[0]:.1f} and {seconds[1]:.1f} s")
    assert max(seconds) <= STALL_S + 4
    for host in range(2):
        stderr = (tmp_path / f"err-{host}").read_text()
        (line,) = [line for line in stderr.splitlines() if "error: rank" in line]
        assert f"rank {1 - host} failed in phase {phase}" in line
        assert "network is down" in line or "connections" in line or "waited for each other" in line


def test_a_cut_cable_ends_a_session_that_waits(tmp_path: Path, cable: None) -> None:
    """The rank that follows ends by itself; rank 0, which was idle, in its next call."""
    pause_s = STALL_S + 6
    processes = launch(tmp_path, "none", "follow", "session", str(STALL_S), str(pause_s), "1")
    try:
        wait_for("encoded", tmp_path / "out-0", 60)
        # Until each has said that it waits.
        time.sleep(2)
        ip("-n star-test-0 link set star0 down")
        cut_at = time.monotonic()
        seconds = wait_for("RankError: rank 0 failed in ", tmp_path / "err-1", 60) - cut_at
        wait_for("RankError: rank 1 failed in generate: no sign of life", tmp_path / "err-0", 60)
    finally:
        end(processes)
    print(f"the rank that follows stopped after {seconds:.1f} s")
    assert seconds <= STALL_S + 4
