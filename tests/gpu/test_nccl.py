"""Ranks with a GPU of their own, over NCCL: the answers are one process's, in every mesh, and a lost rank ends the others.

Each case is the command under torchrun, as users run it; it is skipped where there are too few GPUs.
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
STALL_S = 10
GPUS = torch.cuda.device_count()


def book(folder: Path) -> Path:
    path = folder / "book.txt"
    path.write_text(
        "".join(f"The tea of day {day} is hot and the cup is blue.\n" for day in range(600))
    )
    return path


def run(
    folder: Path,
    ranks: int,
    *words: str,
    program: tuple[str, ...] = ("-m", "star_attention"),
    **environment: str,
) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--rdzv-backend",
        "c10d",
    ]
    launcher += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
    return subprocess.run(
        [
            *(sys.executable, *(launcher if ranks > 1 else []), *program),
            *(
                "generate",
                "-m",
                str(MODEL),
                "--chat",
                "--dtype",
                "float32",
                "--query",
                "What is the cup like?",
            ),
            *("--max-new-tokens", "12", "--ignore-eos", "--json", str(book(folder)), *words),
        ],
        env=os.environ
        | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2", TORCH_NCCL_DEBUG="WARN")
        | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@functools.cache
def alone(*words: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return reply(Path(folder), 1, *words)


def reply(folder: Path, ranks: int, *words: str) -> dict[str, Any]:
    done = run(folder, ranks, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize(
    ("ranks", "words"),
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
def test_ranks_with_a_gpu_each(tmp_path: Path, ranks: int, words: list[str]) -> None:
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs, there are {GPUS}")
    shared = reply(tmp_path, ranks, *words)
    expected = alone(*(["--method", "dense"] if "ring" in words else words[:2]))
    print(
        f"{ranks} GPUs {words}: {shared['per_rank']}, ttft {shared['ttft_s']:.3f}, {shared['tokens_per_s']:.0f} tok/s"
    )
    assert shared["token_ids"] == expected["token_ids"]
    assert all(host["peak_bytes"] > 0 for host in shared["per_rank"])


@pytest.mark.parametrize(
    ("what", "phase"), [("killed", "1"), ("hanging", "1"), ("hanging", "2"), ("failing", "2")]
)
@pytest.mark.parametrize("words", [[], ["--tensor-parallel", "2"]])
def test_a_lost_rank_ends_the_others(
    tmp_path: Path, what: str, phase: str, words: list[str]
) -> None:
    """NCCL's collectives wait on the device, where the watch has to end them."""
    if GPUS < 2:
        pytest.skip("needs 2 GPUs")
    sizes = ["--block-size", "256", "--tokens-per-forward", "256", "--stall-limit", str(STALL_S)]
    at = tmp_path / "fault"
    done = run(
        tmp_path, 2, *sizes, *words, program=(str(FAULTY), what, phase, "1"), FAULT_TIME=str(at)
    )
    took = time.time() - float(at.read_text())
    print(f"NCCL {words}, rank 1 {what} in phase {phase}: {took:.1f} s")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert any("rank 1" in line for line in lines), done.stderr[-4000:]
    assert took < 2 * STALL_S + 15, "the stall limit, the victim's own end, and torchrun's"
