"""Law 2: on any number of ranks, tokens and (to rounding) logits are the mask oracle's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from tests.dist.checks import answer, answer_with, check_tiny
from tests.dist.pool import Pool
from tests.engines import CONTEXT, QUERY, ids, tiny
from tests.families import FAMILIES as ALL
from tests.tiers import in_turn

FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "mistral",
    "deepseek_v3",
    "gemma3n",
    "phi3_longrope",
]
SIZES = dict(block_size=24, anchor_size=10)
GEOMETRIES = {
    "blocks of 16": dict(block_size=16, anchor_size=16),
    "ragged, small anchor": SIZES,
    "no anchor": dict(block_size=24, anchor_size=0),
    "fewer blocks than ranks": dict(block_size=64, anchor_size=20),
    "one block": dict(block_size=128, anchor_size=128),
}


@pytest.mark.parametrize(("geometry", "ranks"), in_turn(2, list(GEOMETRIES), [2, 3, 4]))
def test_every_geometry(pool: Pool, geometry: str, ranks: int) -> None:
    sizes = GEOMETRIES[geometry]
    check_tiny(pool.run(answer, ranks, name="llama", **sizes), "llama", **sizes)


# Each turn has both sources and both collectives.
WAYS = [
    (2, "gather", "broadcast"),
    (4, "reduce", "broadcast"),
    (3, "reduce", "local"),
    (4, "gather", "local"),
]


@pytest.mark.parametrize(
    ("name", "ranks", "merge_collective", "source"), in_turn(2, FAMILIES, WAYS)
)
def test_every_family(
    pool: Pool, name: str, ranks: int, merge_collective: str, source: str
) -> None:
    settings: dict[str, Any] = dict(merge_collective=merge_collective, anchor_source=source)
    check_tiny(pool.run(answer, ranks, name=name, **settings, **SIZES), name, **SIZES)


@pytest.mark.parametrize("name", in_turn(4, sorted(set(ALL) - set(FAMILIES))))
def test_every_other_decoder(pool: Pool, name: str) -> None:
    check_tiny(pool.run(answer, 2, name=name, **SIZES), name, **SIZES)


@pytest.mark.parametrize("name", in_turn(2, ["llama", "deepseek_v3", "gemma3", "gemma3n"]))
def test_seven_ranks_with_three_blocks(pool: Pool, name: str) -> None:
    """Idle ranks take part."""
    sizes = dict(block_size=40, anchor_size=16)
    results = pool.run(answer, 7, name=name, **sizes)
    segments = [len(result["layout"][rank]) for rank, result in enumerate(results)]
    assert segments == [1, 1, 1, 0, 0, 0, 0]
    check_tiny(results, name, **sizes)


@pytest.mark.parametrize("source", ["broadcast", "local"])
@pytest.mark.parametrize("tokens_per_forward", [7, 24, 4096])
def test_an_anchor_in_several_forwards(pool: Pool, tokens_per_forward: int, source: str) -> None:
    """The anchor may be larger than a forward, and arrives in parts."""
    sizes = dict(block_size=24, anchor_size=17)
    settings: dict[str, Any] = dict(tokens_per_forward=tokens_per_forward, anchor_source=source)
    check_tiny(pool.run(answer, 3, name="gemma2", **settings, **sizes), "gemma2", **sizes)


def answer_with_device_map(comm: TorchComm, path: Path) -> dict[str, Any]:
    device_map = {"": "cpu"} if torch.cuda.is_available() else "auto"
    model_kwargs = dict(device_map=device_map)
    star = StarLLM.from_pretrained(path, comm=comm, model_kwargs=model_kwargs, **SIZES)
    return answer_with(star)


def test_each_rank_may_spread_its_layers(pool: Pool, tmp_path: Path) -> None:
    """Layers stay on the CPU here; `tests/gpu` spreads layers over a GPU and the CPU."""
    pytest.importorskip("accelerate")
    tiny("qwen3").save_pretrained(tmp_path)
    check_tiny(pool.run(answer_with_device_map, 2, path=tmp_path), "qwen3", **SIZES)


# ------------------------------------------------------------------ the same bits, the same seeds


def answer_hashing(comm: Any, **settings: Any) -> dict[str, Any]:
    """Return an answer as `answer` does, a sampled one, and hashes of all merged states."""
    star = StarLLM(
        tiny("llama"), comm=comm, tokens_per_forward=48, reserve_tokens=64, **SIZES, **settings
    )
    hashes: list[str] = []
    own: Any = star.runtime.comm
    merge = own.merge

    def merge_and_hash(state: Any, *arguments: Any) -> Any:
        merged = merge(state, *arguments)
        bits = merged.out_BQHD.numpy().tobytes() + merged.lse_BQH.numpy().tobytes()
        hashes.append(hashlib.sha256(bits).hexdigest())
        return merged

    own.merge = merge_and_hash
    result = answer_with(star)
    context = star.encode(ids(CONTEXT))
    sampled = star.generate(
        context, ids(QUERY, seed=4), do_sample=True, temperature=1.5, seed=11, max_new_tokens=12
    )
    return result | dict(hashes=hashes, sampled=sampled.token_ids)


@pytest.mark.parametrize(
    ("ranks", "merge_collective"), in_turn(2, [1, 2, 3, 4], ["gather", "reduce"])
)
def test_bits_and_seeds(pool: Pool, ranks: int, merge_collective: str) -> None:
    """Forbids ranks that drift apart, and a seed that depends on how many there are."""
    alone = answer_hashing(SoloComm())
    results = [alone]
    if ranks > 1:
        results = pool.run(answer_hashing, ranks, merge_collective=merge_collective)
    check_tiny(results, "llama", **SIZES)
    for result in results:
        # Alone, a rank has nothing to merge.
        assert (len(result["hashes"]) > 20) == (ranks > 1)
        assert result["hashes"] == results[0]["hashes"]
        assert result["sampled"] == alone["sampled"]
