"""Decode steps of many rows as CUDA graphs on two ranks: answers are those of one rank without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from tests.gpu import ranks

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
SETTINGS: list[dict[str, Any]] = [
    dict(),
    dict(slice_weights=True),
    dict(kv_dtype="fp8"),
    # One block: the last rank, which holds the tails, has no part of the contexts.
    dict(block_size=8192),
    dict(tensor_parallel=2),
]


def ids(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4096, (tokens,), generator=generator).tolist()


def rows_of(comm: Any, device: str, compile: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Answer in batches whose rows come and go; rank 0 leads."""
    star = StarLLM.from_pretrained(
        MODEL,
        dtype="float32",
        device=device,
        comm=comm,
        compile=compile,
        **(dict(block_size=1024) | settings),
    )
    tokens: list[list[int]] = []
    if star.rank:
        star.follow()
    else:
        contexts = [star.encode(ids(4000)), star.encode(ids(2500, seed=2))]
        with star.batch(max_rows=5) as batch:
            rows = [
                batch.add(
                    contexts[number % 3 // 2],
                    ids(5 + number, seed=number),
                    max_new_tokens=4 + 40 * (number % 2),
                    ignore_eos=True,
                )
                for number in range(8)
            ]
            tokens = [row.result().token_ids for row in rows]
        star.close()
    graphs = star.runtime.handle.graphs
    return dict(tokens=tokens, captured={} if graphs is None else graphs.of_rows.captured)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_on_two_ranks(settings: dict[str, Any]) -> None:
    results = ranks.run(rows_of, 2, compile=True, settings=settings)
    alone = {name: settings[name] for name in ("kv_dtype", "block_size") if name in settings}
    expected = rows_of(SoloComm(), "cuda", False, alone)
    assert results[0]["tokens"] == expected["tokens"]
    for result in results:
        assert {key[0] for key in result["captured"]} >= {4, 8}
        assert all(result["captured"].values())
