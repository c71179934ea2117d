"""Short contexts of a small model on a GPU: the default loses nothing to dense attention."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.bench.models import load_model

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
