"""Ranks with compiled layers: compiling takes longer than the stall limit, and is no stall."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from star_attention import EncodedContext, StarLLM, phase1
from star_attention.distributed import TorchComm
from tests.dist.pool import Pool
from tests.dist.tp_models import on_disk
from tests.engines import CONTEXT, ids, tiny

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)
STALL_S = 4.0


@contextmanager
def compiling_anew(comm: TorchComm, cache: Path) -> Iterator[None]:
    """Compile every forward, with empty caches of torch.compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase1, "_WORTH_COMPILING", 1)
        patch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(cache / str(comm.rank)))
        yield


def assert_same(context: EncodedContext, expected: EncodedContext) -> None:
    for layer, expected_layer in zip(context.kv.layers, expected.kv.layers, strict=True):
        for actual, right in zip(layer.pair(), expected_layer.pair(), strict=True):
            torch.testing.assert_close(actual, right, atol=1e-4, rtol=1e-4)


def encode_compiled(comm: TorchComm, port: int, cache: Path) -> tuple[float, int]:
    """Return the seconds of an encoding that compiles, and the number of graphs compiled."""
    own = TorchComm(comm.rank, comm.size, "127.0.0.1", port, name="compiling", stall_s=STALL_S)
    model = tiny("llama")
    expected = StarLLM(model, comm=own, compile=False, **SIZES).encode(ids(CONTEXT))
    before, started = counters["stats"]["unique_graphs"], time.monotonic()
    with compiling_anew(comm, cache):
        context = StarLLM(model, comm=own, compile=True, **SIZES).encode(ids(CONTEXT))
    seconds = time.monotonic() - started
    assert_same(context, expected)
    own.close()
    return seconds, counters["stats"]["unique_graphs"] - before


@pytest.mark.slow
def test_compiling_is_no_stall(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(encode_compiled, 2, port=pool.port, cache=tmp_path)
    assert all(graphs > 0 for _, graphs in results)
    assert all(seconds > STALL_S for seconds, _ in results), "too quick to be a test"


def encode_sharded(comm: TorchComm, path: Path, cache: Path) -> bool:
    """Return True if a sharded model's layers were compiled whole."""
    settings: dict[str, Any] = dict(comm=comm, device="cpu", tensor_parallel=2, **SIZES)
    plain = StarLLM.from_pretrained(path, compile=False, **settings)
    assert plain.runtime.handle.compiled is None
    expected = plain.encode(ids(CONTEXT))
    star = StarLLM.from_pretrained(path, compile=True, **settings)
    with compiling_anew(comm, cache):
        assert_same(star.encode(ids(CONTEXT)), expected)
    compiled = star.runtime.handle.compiled
    return compiled is not None and compiled.whole


@pytest.mark.slow
def test_a_shard_is_compiled(pool: Pool, models: Path, tmp_path: Path) -> None:
    path = on_disk(models, "llama")
    assert pool.run(encode_sharded, 2, path=path, cache=tmp_path) == [True, True]
