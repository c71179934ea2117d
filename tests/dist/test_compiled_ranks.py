"""Ranks with compiled layers: compiling takes longer than the stall limit, and is no stall."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from star_attention import StarLLM, phase1
from star_attention.distributed import TorchComm
from tests.dist.pool import Pool
from tests.engines import CONTEXT, ids, tiny

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)
STALL_S = 4.0


def encode_compiled(comm: TorchComm, port: int, cache: Path) -> tuple[float, int]:
    """Return the seconds of an encoding with empty caches of torch.compile, and graphs compiled."""
    own = TorchComm(comm.rank, comm.size, "127.0.0.1", port, name="compiling", stall_s=STALL_S)
    model = tiny("llama")
    plain = StarLLM(model, comm=own, compile=False, **SIZES).encode(ids(CONTEXT))
    before = counters["stats"]["unique_graphs"]
    folder = str(cache / str(comm.rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase1, "_WORTH_COMPILING", 1)
        patch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", folder)
        started = time.monotonic()
        context = StarLLM(model, comm=own, compile=True, **SIZES).encode(ids(CONTEXT))
    seconds = time.monotonic() - started
    for layer, expected in zip(context.kv.layers, plain.kv.layers, strict=True):
        for actual, right in zip(layer.pair(), expected.pair(), strict=True):
            torch.testing.assert_close(actual, right, atol=1e-4, rtol=1e-4)
    own.close()
    return seconds, counters["stats"]["unique_graphs"] - before


@pytest.mark.slow
def test_compiling_is_no_stall(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(encode_compiled, 2, port=pool.port, cache=tmp_path)
    assert all(graphs > 0 for _, graphs in results)
    assert all(seconds > STALL_S for seconds, _ in results), "too quick to be a test"
