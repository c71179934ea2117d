"""Weights in slices on ranks over NCCL: answers as with whole weights, by graphs and eagerly.

Where there are fewer GPUs than ranks, all share one (`shared_gpu/sitecustomize.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_nccl import GPUS, SHARED_GPU, launcher, reply, solo_reply

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).parent / "sliced_ranks.py"


def lines_of(ranks: int, *arguments: str) -> list[dict[str, Any]]:
    environment = os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
    if ranks > GPUS:
        paths = [str(SHARED_GPU), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    result = subprocess.run(
        [*launcher(ranks), str(PROGRAM), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    print(result.stdout)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("ranks", [2, 3])
def test_answers_are_those_of_whole_weights(ranks: int) -> None:
    """In bfloat16 to rounding, which may change a token where two are nearly as likely."""
    lines = lines_of(ranks, "check")
    assert len(lines) == 6
    for line in lines:
        exact = line["case"].startswith("float32")
        assert {"mlp", "head"} <= set(line["parts"])
        assert line["captured"]
        assert line["error"] <= (1e-4 if exact else 0.03)
        if exact:
            assert all(line["same"])


@pytest.mark.parametrize("options", [[], ["--no-compile"]])
def test_the_command_line(tmp_path: Path, options: list[str]) -> None:
    sizes = ["--block-size", "1k"]
    answer = reply(tmp_path, 2, *sizes, "--slice-weights", *options)
    assert answer["token_ids"] == solo_reply(*sizes)["token_ids"]
