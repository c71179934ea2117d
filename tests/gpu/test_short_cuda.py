"""Short contexts of a small model on a GPU: the default loses nothing to dense attention."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.bench.models import load_model

if TYPE_CHECKING:
    from star_attention.hf.execution.encode_graphs import EncodeGraphs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(None, "smollm2-135m", dtype="bfloat16", device="cuda")


@pytest.mark.parametrize("tokens", [4000, 4096, 8192])
def test_the_default_is_no_slower_than_dense(model: Any, tokens: int) -> None:
    engines = {
        "default": StarLLM(model),
        "dense": StarLLM(model, method="dense"),
        "star": StarLLM(model, block_size=1024),
    }
    ids = list(range(100, 100 + tokens))
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(9):
        for name, star in engines.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            context = star.encode(ids)
            torch.cuda.synchronize()
            # The first two compile.
            if number > 1:
                seconds[name].append(time.perf_counter() - start)
            assert context.plan.is_dense == (name != "star")
    medians = {name: round(1000 * median(values), 1) for name, values in seconds.items()}
    print(f"{tokens:,} tokens, ms: {medians}")
    assert medians["default"] <= 1.1 * medians["dense"]


def test_a_short_context_is_one_forward_in_blocks_too(model: Any) -> None:
    spans = []
    StarLLM(model, block_size=1024).encode(
        list(range(100, 4100)), progress=lambda span, plan: spans.append(span.tokens)
    )
    assert spans == [4000]


def _graphs_of(star: StarLLM) -> EncodeGraphs:
    graphs = star.runtime.handle.graphs
    assert graphs is not None
    return graphs.of_encoding


@pytest.mark.parametrize("tokens", [3000, 4096])
@pytest.mark.parametrize("settings", [dict(method="dense"), dict(block_size=1024)])
def test_graphs_store_the_keys_of_plain_forwards(
    model: Any, settings: dict[str, Any], tokens: int
) -> None:
    """In bfloat16, up to the rounding of kernels for other lengths; each context keeps its own."""
    plain, fast = StarLLM(model, compile=False, **settings), StarLLM(model, **settings)
    graphs = _graphs_of(fast)
    contents = [list(range(start, start + tokens)) for start in (100, 200, 300)]
    contexts = [fast.encode(content) for content in contents]
    assert len(graphs.captured) == 1
    for context, content in zip(contexts, contents, strict=True):
        right = plain.encode(content)
        for own, other in zip(context.kv.layers, right.kv.layers, strict=True):
            for tensor, exact in zip(own.stored(), other.stored(), strict=True):
                assert tensor.shape == exact.shape
                error = (tensor.float() - exact.float()).norm() / exact.float().norm()
                assert error < 0.03


def test_encoding_by_graphs_is_no_slower_in_blocks_than_dense(model: Any) -> None:
    engines = {"dense": StarLLM(model, method="dense"), "star": StarLLM(model, block_size=2048)}
    ids = torch.arange(100, 8292)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(12):
        for name, star in engines.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            star.encode(ids)
            torch.cuda.synchronize()
            # The first compiles, the second captures.
            if number > 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: round(1000 * median(values), 2) for name, values in seconds.items()}
    print(f"8,192 tokens by graphs, ms: {medians}")
    assert medians["star"] <= 1.05 * medians["dense"]
