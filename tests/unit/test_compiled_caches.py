"""Compiled layers in a process that finds their code on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ | {"TRITON_INTERPRET": "1"}
STEPS_IN_A_PROCESS = """
import sys
import torch
from star_attention.hf.execution import compiled
from star_attention.hf.execution.handle import ModelHandle
from tests.engines import engine, ids

stock = ModelHandle.logits

def logits(self, ids_BS, *args, compiled_for=None, **kwargs):
    mode = sys.argv[1] if ids_BS.shape[1] == 1 else None
    return stock(self, ids_BS, *args, compiled_for=mode, **kwargs)

ModelHandle.logits = logits
compiled.triton_works = lambda device: True
star = engine("llama", compile=True)
star.generate(star.encode(ids(60)), ids(7), max_new_tokens=3, ignore_eos=True)
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["step", "rows"])
def test_compiled_steps_of_another_process(mode: str, tmp_path: Path) -> None:
    """Code from a cache on disk runs without the passes that made it, and so what they import."""
    environment = INTERPRETED | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = [
        int(
            subprocess.run(
                [sys.executable, "-c", STEPS_IN_A_PROCESS, mode],
                env=environment, check=True, capture_output=True, text=True,
            ).stdout
        )
        for _ in range(2)
    ]  # fmt: skip
    assert hits[0] == 0
    assert hits[1] > 0


def test_layers_know_the_operations_of_their_passes() -> None:
    """A process that finds compiled code on disk runs no pass, which would import them."""
    code = (
        "import torch\n"
        "from star_attention.hf.execution import compiled\n"
        "from star_attention.hf.execution.handle import ModelHandle\n"
        "from tests.families import build\n"
        "compiled.triton_works = lambda device: True\n"
        "compiled.CompiledLayers(ModelHandle(build('llama')))\n"
        "operations = torch.ops.star_attention\n"
        "names = 'folded_linears', 'row_norms', 'normed_linear', 'sum_product_norms'\n"
        "print(*(getattr(operations, name) for name in names))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=INTERPRETED, capture_output=True, text=True
    )
    names = ["folded_linears", "row_norms", "normed_linear", "sum_product_norms"]
    assert found.stdout.split() == [f"star_attention.{name}" for name in names], found.stderr
