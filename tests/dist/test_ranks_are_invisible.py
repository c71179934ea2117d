"""Law 2: on any number of ranks the tokens are those of the mask oracle, and the logits to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from tests.dist.pool import Pool
from tests.engines import CONTEXT, QUERY, ids, tiny
from tests.families import FAMILIES as ALL
from tests.model_oracle import oracle_forward, oracle_generate

STEPS = 6
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "mistral", "deepseek_v3", "gemma3n", "phi3_longrope"]
GEOMETRIES = {
    "blocks of 16": dict(block_size=16, anchor_size=16),
    "ragged, small anchor": dict(block_size=24, anchor_size=10),
    "no anchor": dict(block_size=24, anchor_size=0),
    "fewer blocks than ranks": dict(block_size=64, anchor_size=20),
    "one block": dict(block_size=128, anchor_size=128),
}


def answered(comm: TorchComm, name: str, tokens_per_forward: int = 48, **settings: Any) -> dict[str, Any]:
    star = StarLLM(tiny(name), comm=comm, tokens_per_forward=tokens_per_forward, reserve_tokens=64, **settings)
    return answer_of(star)


def answer_of(star: StarLLM) -> dict[str, Any]:
    """A context encoded and asked; what came out on this rank, logits on rank 0 only."""
    # Rank 0's arguments count.
    own = star.rank == 0
    context = star.encode(ids(CONTEXT) if own else [5])
    reply = star.generate(
        context,
        ids(CONTEXT + QUERY)[CONTEXT:] if own else None,
        max_new_tokens=STEPS if own else 1,
        ignore_eos=own,
        return_logits=True,
    )
    kv = [
        (index, [layer.slice(*segment) for segment in layer.segments])
        for index, layer in enumerate(context.kv.layers)
        if not layer.is_empty
    ]
    return dict(
        tokens=reply.token_ids,
        logits=reply.logits,
        kv=kv,
        layout=context.layout,
        rope_length=context.rope_length,
    )


def check_against_oracle(results: list[dict[str, Any]], name: str, block_size: int, anchor_size: int) -> None:
    check_model(results, tiny(name), block_size, anchor_size)


def check_model(
    results: list[dict[str, Any]], model: Any, block_size: int, anchor_size: int, tensor_parallel: int = 1
) -> None:
    sizes = dict(
        context_len=CONTEXT, block_size=block_size, anchor_size=anchor_size, rope_length=results[0]["rope_length"]
    )
    all_ids = torch.tensor([ids(CONTEXT + QUERY)])
    expected = oracle_forward(model, all_ids[:, :CONTEXT], **sizes).kv
    cached = {index: at for at, index in enumerate(sorted({index for r in results for index, _ in r["kv"]}))}
    held: list[int] = []
    for rank, result in enumerate(results):
        host, share = divmod(rank, tensor_parallel)
        segments = result["layout"][host]
        assert result["layout"] == results[0]["layout"]
        held += [token for start, stop in segments if share == 0 for token in range(start, stop)]
        for index, pairs in result["kv"]:
            for (start, stop), pair in zip(segments, pairs, strict=True):
                for ours, theirs in zip(pair, expected[cached[index]], strict=True):
                    part = theirs[:, :, start:stop].chunk(tensor_parallel, 1)[share]
                    torch.testing.assert_close(ours, part, atol=1e-4, rtol=1e-4)
    assert sorted(held) == list(range(CONTEXT))
    tokens, logits = oracle_generate(model, all_ids, steps=STEPS, **sizes)
    for result in results:
        assert result["tokens"] == tokens[0].tolist()
    scale = max(1.0, logits.abs().max().item())
    assert (results[0]["logits"] - logits[0]).abs().max().item() <= 1e-4 * scale
    assert all(result["logits"] is None for result in results[1:])


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(pool: Pool, geometry: str, ranks: int) -> None:
    sizes = GEOMETRIES[geometry]
    check_against_oracle(pool.run(answered, ranks, name="llama", **sizes), "llama", **sizes)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("ranks", "how", "source"),
    [(2, "gather", "broadcast"), (3, "reduce", "local"), (4, "reduce", "broadcast"), (4, "gather", "local")],
)
def test_every_family(pool: Pool, name: str, ranks: int, how: str, source: str) -> None:
    sizes = GEOMETRIES["ragged, small anchor"]
    results = pool.run(answered, ranks, name=name, merge_collective=how, anchor_source=source, **sizes)
    check_against_oracle(results, name, **sizes)


@pytest.mark.parametrize("name", sorted(set(ALL) - set(FAMILIES)))
def test_every_other_decoder(pool: Pool, name: str) -> None:
    sizes = GEOMETRIES["ragged, small anchor"]
    check_against_oracle(pool.run(answered, 2, name=name, **sizes), name, **sizes)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "gemma3n"])
def test_seven_ranks_with_three_blocks(pool: Pool, name: str) -> None:
    """Idle ranks take part."""
    sizes = dict(block_size=40, anchor_size=16)
    results = pool.run(answered, 7, name=name, **sizes)
    assert [len(result["layout"][rank]) for rank, result in enumerate(results)] == [1, 1, 1, 0, 0, 0, 0]
    check_against_oracle(results, name, **sizes)


@pytest.mark.parametrize("source", ["broadcast", "local"])
@pytest.mark.parametrize("tokens_per_forward", [7, 24, 4096])
def test_an_anchor_in_several_forwards(pool: Pool, tokens_per_forward: int, source: str) -> None:
    """The anchor may be larger than a forward, and arrives in shares."""
    sizes = dict(block_size=24, anchor_size=17)
    results = pool.run(
        answered, 3, name="gemma2", tokens_per_forward=tokens_per_forward, anchor_source=source, **sizes
    )
    check_against_oracle(results, "gemma2", **sizes)


def spread(comm: TorchComm, path: Path) -> dict[str, Any]:
    sizes = GEOMETRIES["ragged, small anchor"]
    device_map = {"": "cpu"} if torch.cuda.is_available() else "auto"
    star = StarLLM.from_pretrained(path, comm=comm, model_kwargs=dict(device_map=device_map), **sizes)
    return answer_of(star)


def test_each_rank_may_spread_its_layers(pool: Pool, tmp_path: Path) -> None:
    """(Over the one device that there is here; over a GPU and the CPU in `tests/gpu`.)"""
    pytest.importorskip("accelerate")
    tiny("qwen3").save_pretrained(tmp_path)
    check_against_oracle(pool.run(spread, 2, path=tmp_path), "qwen3", **GEOMETRIES["ragged, small anchor"])
