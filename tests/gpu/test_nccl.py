"""Ranks over NCCL: the answers are one process's, and a lost rank ends the others.

Each case is the command under torchrun, as users run it. Where there are fewer GPUs than ranks, all
share one (`shared_gpu/sitecustomize.py`).
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_follow_faults import check_session_ends

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
FAULTY = Path(__file__).parents[1] / "dist" / "faulty.py"
SHARED_GPU = Path(__file__).parent / "shared_gpu"
STALL_S = 10
GPUS = torch.cuda.device_count()


def book(folder: Path) -> Path:
    path = folder / "book.txt"
    path.write_text(
        "".join(f"The tea of day {day} is hot and the cup is blue.\n" for day in range(600))
    )
    return path


def launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]


def defaults(ranks: int) -> dict[str, str]:
    """Return the environment of the ranks."""
    environment = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
    if ranks > GPUS:
        paths = [str(SHARED_GPU), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def run(
    folder: Path,
    ranks: int,
    *options: str,
    program: tuple[str, ...] = ("-m", "star_attention"),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    command = [*launcher(ranks), *program, "generate", "-m", str(MODEL), "--chat"]
    command += ["--dtype", "float32", "--query", "What is the cup like?"]
    command += ["--max-new-tokens", "12", "--ignore-eos", "--json", str(book(folder)), *options]
    return subprocess.run(
        command,
        env=os.environ | defaults(ranks) | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def reply(folder: Path, ranks: int, *options: str) -> dict[str, Any]:
    result = run(folder, ranks, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@functools.cache
def solo_reply(*options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return reply(Path(folder), 1, *options)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ["--block-size", "1k"]),
        (2, ["--block-size", "1k", "--tensor-parallel", "2"]),
        (2, ["--block-size", "1k", "--anchor-source", "local"]),
        (2, ["--method", "ring"]),
        (4, ["--block-size", "1k"]),
        (4, ["--block-size", "1k", "--tensor-parallel", "2"]),
        (4, ["--method", "ring", "--tensor-parallel", "2"]),
    ],
)
def test_ranks_over_nccl(tmp_path: Path, ranks: int, options: list[str]) -> None:
    answer = reply(tmp_path, ranks, *options)
    expected = solo_reply(*(["--method", "dense"] if "ring" in options else options[:2]))
    print(
        f"{ranks} ranks on {GPUS} GPUs {options}: {answer['per_rank']},"
        f" ttft {answer['ttft_s']:.3f}, {answer['tokens_per_s']:.0f} tok/s"
    )
    assert answer["token_ids"] == expected["token_ids"]
    assert all(cp_rank["peak_bytes"] > 0 for cp_rank in answer["per_rank"])


def test_compiling_is_no_stall(tmp_path: Path) -> None:
    """One rank compiles for longer than the stall limit, while the device of another waits for it.

    The first rank seemed to hang then, or the second.
    """
    stall_s = 3
    sizes = ["--block-size", "1k", "--tokens-per-forward", "4k"]
    caches = dict(
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
        TRITON_CACHE_DIR=str(tmp_path / "triton"),
    )
    started = time.monotonic()
    result = run(tmp_path, 2, *sizes, "--stall-limit", str(stall_s), **caches)
    print(f"NCCL, cold caches of the compiler: {time.monotonic() - started:.1f} s in all")
    assert result.returncode == 0, result.stderr[-3000:]
    assert any((tmp_path / "inductor").rglob("*.py")), "nothing was compiled"
    assert json.loads(result.stdout)["token_ids"] == solo_reply(*sizes)["token_ids"]


@pytest.mark.parametrize(
    ("fault", "phase"), [("killed", "1"), ("hanging", "1"), ("hanging", "2"), ("failing", "2")]
)
@pytest.mark.parametrize("options", [[], ["--tensor-parallel", "2"]])
def test_a_lost_rank_ends_the_others(
    tmp_path: Path, fault: str, phase: str, options: list[str]
) -> None:
    """NCCL's collectives wait on the device, where the watchdog has to end them."""
    sizes = ["--block-size", "256", "--tokens-per-forward", "256", "--stall-limit", str(STALL_S)]
    fault_time = tmp_path / "fault"
    program = (str(FAULTY), fault, phase, "1")
    result = run(tmp_path, 2, *sizes, *options, program=program, FAULT_TIME=str(fault_time))
    seconds = time.time() - float(fault_time.read_text())
    print(f"NCCL {options}, rank 1 {fault} in phase {phase}: {seconds:.1f} s")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert any("rank 1" in line for line in lines), result.stderr[-4000:]
    assert seconds < 2 * STALL_S + 15, "the stall limit, the victim's own end, and torchrun's"


# ------------------------------------------------------------------ sessions that rank 0 leads

# In phase 2 the fault comes in the 20th forward: inside the collectives of CUDA graphs, where the
# ranks have any.
LATE = dict(FAULT_FORWARD="20")


@pytest.mark.parametrize("phase", ["1", "help", "2", "follow"])
@pytest.mark.parametrize("fault", ["killed", "hanging", "stopped"])
def test_a_lost_rank_ends_a_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, phase: str
) -> None:
    set_environment(monkeypatch)
    check_session_ends(tmp_path, fault, phase, 1, ranks=2, stall_s=STALL_S)


@pytest.mark.parametrize(
    ("fault", "phase"), [("killed", "2"), ("killed", "help"), ("hanging", "help")]
)
def test_a_lost_rank_0_ends_a_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, phase: str
) -> None:
    set_environment(monkeypatch)
    check_session_ends(tmp_path, fault, phase, 0, ranks=2, stall_s=STALL_S)


def set_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TEST_PORT", str(free.getsockname()[1]))
    for name, value in (defaults(2) | LATE).items():
        monkeypatch.setenv(name, value)


def lead(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Return what the ranks of `led.py` write."""
    folder.mkdir()
    program = [*launcher(ranks), str(Path(__file__).with_name("led.py")), str(folder)]
    result = subprocess.run(
        program,
        env=os.environ | defaults(ranks),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def test_a_session_is_what_it_is_on_one_gpu(tmp_path: Path) -> None:
    """Streams are left half-way, suspended, closed and dropped, and hundreds of answers given."""
    (alone,) = lead(tmp_path / "1", 1)
    ranks = lead(tmp_path / "2", 2)
    assert ranks[0]["tokens of lead"] == alone["tokens of lead"]
    for rank, result in enumerate([alone, *ranks]):
        warm, end = result["allocated"][1:]
        print(f"{rank}: {warm:,} then {end:,} bytes, {result['graphs']} graphs")
        assert end - warm < 2**20, "200 answers leave nothing on the device"
