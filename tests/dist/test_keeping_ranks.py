"""fp8 keys and values over ranks: the anchor travels as it was computed, files hold what each rank has stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention.distributed import SoloComm
from tests.dist.pool import Pool
from tests.engines import engine, ids

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48, kv_dtype="fp8")
WORDS: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True, return_logits=True)


def answered(comm: Any, method: str, source: str, save: Path | None) -> Any:
    sizes = SIZES | dict(tokens_per_forward=128)  # (dense reads what it has stored, where it takes several forwards)
    star = engine("llama", comm=comm, method=method, anchor_source=source, **(sizes if method != "star" else SIZES))
    context = star.encode(ids(101))
    if save is not None:
        context.save(save)
    reply = star.generate(context, ids(7, seed=2), **WORDS)
    stored = [[tensor.clone() for tensor in layer.pair()] for layer in context.kv.layers if not layer.is_empty]
    return reply.token_ids, reply.logits, stored


def loaded(comm: Any, path: Path) -> Any:
    star = engine("llama", comm=comm, **SIZES)
    context = star.load_context(path)
    assert context.kv.kv_format.dtype == "fp8"
    reply = star.generate(context, ids(7, seed=2), **WORDS)
    return star.generate(star.extend(context, ids(9)), ids(3), **WORDS).token_ids, reply.token_ids


@pytest.mark.parametrize(("method", "source"), [("star", "broadcast"), ("star", "local"), ("ring", "broadcast")])
def test_ranks_store_what_one_does(pool: Pool, tmp_path: Path, method: str, source: str) -> None:
    alone = "dense" if method == "ring" else method
    tokens, logits, stored = answered(SoloComm(), alone, source, None)
    results = pool.run(answered, 3, method=method, source=source, save=tmp_path / "shared.star")
    assert [result[0] for result in results] == [tokens] * 3
    # (A number on the edge between two steps of fp8 may fall to either side, as it was computed in another order.)
    torch.testing.assert_close(results[0][1], logits, atol=2e-2, rtol=1e-2)
    if method == "star":
        for layer, whole in enumerate(stored):
            for part, expected in enumerate(whole):
                together = torch.cat([result[2][layer][part] for result in results], 2)
                steps = (together - expected).abs() > 1e-4 * expected.abs()
                assert steps.float().mean() < 0.01
        (one,) = {str(loaded(SoloComm(), tmp_path / "shared.star"))}
        assert {str(answer) for answer in pool.run(loaded, 2, path=tmp_path / "shared.star")} == {one}


