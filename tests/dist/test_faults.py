"""A rank that dies, hangs or fails: the others stop in time, say which and why, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engines import BUNDLED

STALL_S = 5
RANKS = 3
FAULTY = Path(__file__).with_name("faulty.py")


def launched(
    tmp_path: Path, what: str, phase: int, victim: int, *more: str, ranks: int = RANKS
) -> list[subprocess.Popen[str]]:
    """The command on several ranks, started without torchrun: what ends a rank is then this library alone."""
    text = tmp_path / "book.txt"
    if not text.exists():
        text.write_text("The tea is hot and the cup is blue.\n" * 150)
    command = [
        *(sys.executable, str(FAULTY), what, str(phase), str(victim)),
        *("generate", "-m", str(BUNDLED), "--chat", "--block-size", "64", "--tokens-per-forward", "64"),
        *("--query", "What is the secret number for otter?", "--max-new-tokens", "30", "--ignore-eos"),
        *("--stall-limit", str(STALL_S), str(text), *more),
    ]
    processes = []
    for rank in range(ranks):
        environment = dict(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
        environment["FAULT_TIME"] = str(tmp_path / "stderr-and-the-time-of-the-fault")
        environment |= dict(MASTER_PORT=os.environ["TEST_PORT"], OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        with open(tmp_path / f"stderr-{rank}", "w") as stderr:  # (a pipe that nobody reads would fill up)
            processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | environment,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    text=True,
                    # (What a shell starts in the background ignores Ctrl-C, and so would its children.)
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                )
            )
    return processes


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TEST_PORT", str(free.getsockname()[1]))


def ended(
    tmp_path: Path, processes: list[subprocess.Popen[str]], victim: int | None, timeout_s: float = 90
) -> tuple[list[int], list[str], float]:
    """Statuses and stderr of all ranks, and the time at which the last one ended, the victim left out."""
    others = [process for rank, process in enumerate(processes) if rank != victim]
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in others):
        assert time.monotonic() < deadline, "some ranks still run"
        time.sleep(0.05)
    at = time.time()
    if victim is not None and processes[victim].poll() is None:
        processes[victim].send_signal(signal.SIGCONT)
        processes[victim].wait(timeout=4 * STALL_S)
    told = [(tmp_path / f"stderr-{rank}").read_text() for rank in range(len(processes))]
    return [process.returncode for process in processes], told, at


def left(tmp_path: Path) -> list[str]:
    """What the command has written."""
    return [path.name for path in tmp_path.iterdir() if path.name != "book.txt" and "stderr" not in path.name]


QUICK = {("killed", 1, 2), ("killed", 2, 0), ("hanging", 1, 2), ("stopped", 2, 2), ("failing", 1, 0), ("full", 2, 2)}
FAULTS = [
    pytest.param(what, phase, victim, marks=[] if (what, phase, victim) in QUICK else pytest.mark.slow)
    for what in ("killed", "hanging", "stopped", "failing", "full")
    for phase in (1, 2)
    for victim in (0, 2)
]


@pytest.mark.parametrize(("what", "phase", "victim"), FAULTS)
def test_the_others_stop_and_say_why(tmp_path: Path, what: str, phase: int, victim: int) -> None:
    check_stops(tmp_path, what, phase, victim)


@pytest.mark.parametrize(("what", "phase"), [("killed", 1), pytest.param("hanging", 2, marks=pytest.mark.slow)])
def test_ranks_that_share_heads_stop_too(tmp_path: Path, what: str, phase: int) -> None:
    check_stops(tmp_path, what, phase, 3, "--tensor-parallel", "2", ranks=4)


def check_stops(tmp_path: Path, what: str, phase: int, victim: int, *more: str, ranks: int = RANKS) -> None:
    processes = launched(tmp_path, what, phase, victim, "--save", str(tmp_path / "book.star"), *more, ranks=ranks)
    statuses, told, at = ended(tmp_path, processes, victim)
    took = at - float((tmp_path / "stderr-and-the-time-of-the-fault").read_text())
    print(f"{what} rank {victim} in phase {phase}: {took:.1f} s")
    assert all(status not in (0, None) for status in statuses), (statuses, told)
    assert took <= STALL_S + 4, "the stall limit, and what it takes to notice and to end on a busy machine"
    lines = [line for one in told for line in one.splitlines() if ": error: " in line]
    cause = {
        "killed": ("died", "no sign of life", "store is unreachable", "it exited"),
        "stopped": ("no sign of life", "store is unreachable", "died"),
        "hanging": ("no progress",),
        "failing": ("planted",),
        "full": ("planted", "out of memory"),
    }[what]
    assert any(f"rank {victim}" in line and any(word in line for word in cause) for line in lines), lines
    assert ("book.star" in left(tmp_path)) == (phase == 2)
    assert set(left(tmp_path)) <= {"book.star"}, "nothing half-written"


@pytest.mark.slow
def test_slow_is_not_silent(tmp_path: Path) -> None:
    """A rank that takes longer than the limit for a call, but gets on, is no fault."""
    started = time.monotonic()
    statuses, told, _ = ended(tmp_path, launched(tmp_path, "slow", 1, 1), None)
    assert statuses == [0] * RANKS, told
    assert time.monotonic() - started > 2 * STALL_S


def test_ctrl_c_stops_all_ranks(tmp_path: Path) -> None:
    processes = launched(tmp_path, "slow", 1, 1)
    deadline = time.monotonic() + 60
    while "encoded: " not in (tmp_path / "stderr-0").read_text():  # in the middle of the work, however slow the start
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGINT)
    sent = time.time()
    statuses, told, at = ended(tmp_path, processes, None, timeout_s=30)
    assert set(statuses) == {130}, (statuses, told)
    assert at - sent < STALL_S
    assert all("Traceback" not in one for one in told), told
    assert left(tmp_path) == []


def test_torchrun_ends_the_others_and_they_say_why(tmp_path: Path) -> None:
    """torchrun sends SIGTERM to all ranks as soon as one has died: they look who it was before they go."""
    text = tmp_path / "book.txt"
    text.write_text("The tea is hot and the cup is blue.\n" * 150)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{os.environ['TEST_PORT']}"),
            *(str(FAULTY), "killed", "1", "2", "generate", "-m", str(BUNDLED), "--chat", "--block-size", "64"),
            *("--tokens-per-forward", "64", "--query", "x", "--stall-limit", str(STALL_S), str(text)),
        ],
        env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", FAULT_TIME=str(tmp_path / "fault")),
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert any("rank 2 failed in " in line and "died" in line for line in lines), done.stderr[-3000:]
    assert not any("interrupted" in line for line in lines)
