"""A rank dies, hangs or fails: the others stop in time, say which and why, and leave nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.engines import BUNDLED
from tests.warm import python

STALL_S = 5
RANKS = 3
FAULTY = Path(__file__).with_name("faulty.py")
OPTIONS = ["--chat", "--block-size", "64", "--tokens-per-forward", "64"]
QUERY = ["--query", "What is the secret number for otter?", "--max-new-tokens", "30"]


def launch(
    tmp_path: Path, fault: str, phase: int | str, victim: int, *options: str, ranks: int = RANKS
) -> list[subprocess.Popen[str]]:
    """Start the command on several ranks, without torchrun: only this library ends a rank."""
    text = tmp_path / "book.txt"
    if not text.exists():
        text.write_text("The tea is hot and the cup is blue.\n" * 150)
    command = ["generate", "-m", str(BUNDLED), *OPTIONS, *QUERY, "--ignore-eos"]
    command += ["--stall-limit", str(STALL_S), str(text), *options]
    return start(tmp_path, [fault, str(phase), str(victim), *command], ranks)


def start(tmp_path: Path, arguments: list[str], ranks: int) -> list[subprocess.Popen[str]]:
    """Start `faulty.py` with these arguments on several ranks."""
    command = python(FAULTY, *arguments)
    processes = []
    for rank in range(ranks):
        environment = dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=os.environ["TEST_PORT"],
            FAULT_TIME=str(tmp_path / "stderr-and-the-time-of-the-fault"),
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
        )
        # A file, because a pipe that nobody reads would fill up.
        with open(tmp_path / f"stderr-{rank}", "w") as stderr:
            processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | environment,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    text=True,
                    # What a shell starts in the background ignores Ctrl-C, as do its children.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                )
            )
    return processes


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TEST_PORT", str(free.getsockname()[1]))


def wait_for_end(
    tmp_path: Path,
    processes: list[subprocess.Popen[str]],
    victim: int | None,
    timeout_s: float = 90,
) -> tuple[list[int], list[str], float]:
    """Return statuses and stderr of all ranks, and when the last one but the victim ended."""
    others = [process for rank, process in enumerate(processes) if rank != victim]
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in others):
        assert time.monotonic() < deadline, "some ranks still run"
        time.sleep(0.05)
    ended_at = time.time()
    if victim is not None and processes[victim].poll() is None:
        processes[victim].send_signal(signal.SIGCONT)
        processes[victim].wait(timeout=4 * STALL_S)
    stderrs = [(tmp_path / f"stderr-{rank}").read_text() for rank in range(len(processes))]
    return [process.returncode for process in processes], stderrs, ended_at


def files_written(tmp_path: Path) -> list[str]:
    """Return the names of the files that the command has written."""
    return [
        path.name
        for path in tmp_path.iterdir()
        if path.name != "book.txt" and "stderr" not in path.name
    ]


QUICK = {
    ("killed", 1, 2),
    ("killed", 2, 0),
    ("stopped", 2, 2),
    ("failing", 1, 0),
    ("full", 2, 2),
}
FAULTS = [
    pytest.param(
        fault, phase, victim, marks=[] if (fault, phase, victim) in QUICK else pytest.mark.slow
    )
    for fault in ("killed", "hanging", "stopped", "failing", "full")
    for phase in (1, 2)
    for victim in (0, 2)
]
CAUSES = {
    "killed": ("died", "no sign of life", "store is unreachable", "it exited"),
    "stopped": ("no sign of life", "store is unreachable", "died"),
    "hanging": ("no progress",),
    "failing": ("planted",),
    "full": ("planted", "out of memory"),
}


@pytest.mark.parametrize(("fault", "phase", "victim"), FAULTS)
def test_the_others_stop_and_say_why(tmp_path: Path, fault: str, phase: int, victim: int) -> None:
    check_stops(tmp_path, fault, phase, victim)


@pytest.mark.parametrize(
    ("fault", "phase"), [("killed", 1), pytest.param("hanging", 2, marks=pytest.mark.slow)]
)
def test_ranks_that_share_heads_stop_too(tmp_path: Path, fault: str, phase: int) -> None:
    check_stops(tmp_path, fault, phase, 3, "--tensor-parallel", "2", ranks=4)


def test_ranks_that_look_back_stop_too(tmp_path: Path) -> None:
    """Others wait for the lost rank's blocks in every layer, not only for the anchor."""
    check_stops(tmp_path, "killed", 1, 1, "--lookback", "2", "--anchor-size", "0")


# Rank 0 computes two layers of the last block of rank 2. Rank 1 takes part in what it sends.
HELP_QUICK = {("killed", 0), ("killed", 2)}


@pytest.mark.parametrize(
    ("fault", "victim"),
    [
        pytest.param(fault, victim, marks=[] if (fault, victim) in HELP_QUICK else pytest.mark.slow)
        for fault in CAUSES
        for victim in (0, 1, 2)
    ],
)
def test_ranks_stop_while_rank_0_computes_for_others(
    tmp_path: Path, fault: str, victim: int
) -> None:
    lines = check_stops(tmp_path, fault, "help", victim)
    assert any("in phase 1" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "victim"), [("killed", 3), ("hanging", 1)])
def test_ranks_that_share_heads_stop_then_too(tmp_path: Path, fault: str, victim: int) -> None:
    options = ["--tensor-parallel", "2", "--block-size", "192"]
    check_stops(tmp_path, fault, "help", victim, *options, ranks=4)


def check_stops(
    tmp_path: Path, fault: str, phase: int | str, victim: int, *options: str, ranks: int = RANKS
) -> list[str]:
    """Let a rank fail; check that all ranks end in time, and return the lines that say why."""
    save = ["--save", str(tmp_path / "book.star")]
    processes = launch(tmp_path, fault, phase, victim, *save, *options, ranks=ranks)
    statuses, stderrs, ended_at = wait_for_end(tmp_path, processes, victim)
    seconds = ended_at - float((tmp_path / "stderr-and-the-time-of-the-fault").read_text())
    print(f"{fault} rank {victim} in phase {phase}: {seconds:.1f} s")
    assert all(status not in (0, None) for status in statuses), (statuses, stderrs)
    assert seconds <= STALL_S + 4, (
        "the stall limit, and what it takes to notice and to end on a busy machine"
    )
    lines = [line for stderr in stderrs for line in stderr.splitlines() if ": error: " in line]
    told = [
        line
        for line in lines
        if f"rank {victim}" in line and any(cause in line for cause in CAUSES[fault])
    ]
    assert told, lines
    assert ("book.star" in files_written(tmp_path)) == (phase == 2)
    assert set(files_written(tmp_path)) <= {"book.star"}, "nothing half-written"
    return told


@pytest.mark.slow
def test_slow_is_not_silent(tmp_path: Path) -> None:
    """A rank that takes longer than the limit for a call, but makes progress, is not at fault."""
    started = time.monotonic()
    statuses, stderrs, _ = wait_for_end(tmp_path, launch(tmp_path, "slow", 1, 1), None)
    assert statuses == [0] * RANKS, stderrs
    assert time.monotonic() - started > 2 * STALL_S


def test_ctrl_c_stops_all_ranks(tmp_path: Path) -> None:
    processes = launch(tmp_path, "slow", 1, 1)
    deadline = time.monotonic() + 60
    # In the middle of the work, however slow the startup.
    while "encoded: " not in (tmp_path / "stderr-0").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGINT)
    sent_at = time.time()
    statuses, stderrs, ended_at = wait_for_end(tmp_path, processes, None, timeout_s=30)
    assert set(statuses) == {130}, (statuses, stderrs)
    assert ended_at - sent_at < STALL_S
    assert all("Traceback" not in stderr for stderr in stderrs), stderrs
    assert files_written(tmp_path) == []


def test_torchrun_ends_the_others_and_they_say_why(tmp_path: Path) -> None:
    """torchrun sends SIGTERM to all ranks when one has died: they find out which before they go."""
    text = tmp_path / "book.txt"
    text.write_text("The tea is hot and the cup is blue.\n" * 150)
    options = ["--nproc-per-node", str(RANKS), "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{os.environ['TEST_PORT']}", "--no-python"]
    rank = [FAULTY, "killed", "1", "2", "generate", "-m", BUNDLED, *OPTIONS]
    rank += ["--query", "x", "--stall-limit", str(STALL_S), text]
    command = python("-m", "torch.distributed.run", *options, *python(*rank))
    environment = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", FAULT_TIME=str(tmp_path / "fault"))
    run = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if ": error: " in line]
    assert any("rank 2 failed in " in line and "died" in line for line in lines), run.stderr[-3000:]
    assert not any("interrupted" in line for line in lines)
