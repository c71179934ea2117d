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
    defaults = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
    if ranks > GPUS:
        paths = [str(SHARED_GPU), os.environ.get("PYTHONPATH", "")]
        defaults["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.run(
        command,
        env=os.environ | defaults | environment,
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
