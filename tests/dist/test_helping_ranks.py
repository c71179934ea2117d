"""Rank 0 computes first layers of other ranks' last blocks: nothing in the answers shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.hf.shape import model_shape
from star_attention.planning import traffic
from star_attention.planning.helping import Help, helps_of_shape
from star_attention.planning.plan import BlockPlan
from tests.dist.checks import check_model, check_tiny
from tests.dist.helped import (
    answer_helped,
    answer_sharded,
    attention_counts,
    count_work,
    encode_helped,
    encode_in_a_batch,
    led_helped,
    shards,
)
from tests.dist.pool import Pool
from tests.dist.tp_models import model as tp_model
from tests.dist.tp_models import on_disk
from tests.engines import CONTEXT, tiny
from tests.families import FAMILIES
from tests.tiers import in_turn


def planned(name: str, ranks: int, forward: int, block: int, anchor: int) -> list[Help]:
    shape = model_shape(tiny(name).config, "float32")
    plan = BlockPlan(context_tokens=CONTEXT, block_size=block, anchor_size=anchor, ranks=ranks)
    with attention_counts():
        return helps_of_shape(shape, plan, tokens_per_forward=forward)


SIZES = [
    # A block is a forward, or takes several, or a forward takes two; a short last block.
    dict(block_size=16, anchor_size=16, tokens_per_forward=16),
    dict(block_size=16, anchor_size=10, tokens_per_forward=5),
    dict(block_size=8, anchor_size=8, tokens_per_forward=16),
    dict(block_size=24, anchor_size=24, tokens_per_forward=24),
]


@pytest.mark.parametrize(
    ("name", "ranks", "sizes"),
    in_turn(3, ["llama", "gemma", "qwen3_moe"], [2, 3, 4], SIZES),
)
def test_answers_are_those_of_the_law(
    pool: Pool, name: str, ranks: int, sizes: dict[str, int]
) -> None:
    forward = sizes["tokens_per_forward"]
    given = planned(name, ranks, forward, sizes["block_size"], sizes["anchor_size"])
    assert given or (ranks, forward) == (3, 24)
    results = pool.run(answer_helped, ranks, name=name, **sizes)
    check_tiny(results, name, sizes["block_size"], sizes["anchor_size"])


# Layers of the other families cannot be split; looking for them here would take all workers long.
QUICK = {"llama", "olmo", "seed_oss", "minimax_m2"}


@pytest.mark.parametrize("name", in_turn(0, list(FAMILIES), quick=lambda name: name in QUICK))
def test_families_are_split_between_layers(pool: Pool, name: str) -> None:
    given = name != "longcat_flash" and planned(name, 2, 16, 16, 16)
    if not given and name not in QUICK:
        pytest.skip("layers of this family cannot be split")
    assert given
    results = pool.run(answer_helped, 2, name=name, **SIZES[0])
    check_tiny(results, name, 16, 16)


# ------------------------------------------------------------------ work and bytes


@pytest.mark.parametrize(
    ("ranks", "sizes", "balance_ranks"),
    [*in_turn(2, [2, 3, 4], SIZES, [True]), (2, SIZES[0], False)],
)
def test_work_and_bytes_are_the_plans(
    pool: Pool, ranks: int, sizes: dict[str, int], balance_ranks: bool
) -> None:
    forward, block, anchor = (
        sizes[name] for name in ("tokens_per_forward", "block_size", "anchor_size")
    )
    given = planned("llama", ranks, forward, block, anchor) if balance_ranks else []
    plan = BlockPlan(context_tokens=CONTEXT, block_size=block, anchor_size=anchor, ranks=ranks)
    results = pool.run(count_work, ranks, balance_ranks=balance_ranks, **sizes)
    for rank, (tokens, _) in enumerate(results):
        # Of the last layer nothing but keys is computed.
        expected = [plan.rank_tokens(rank)] * 2 + [0]
        for each in given:
            for layer in range(each.layers):
                expected[layer] += {0: each.tokens, each.rank: -each.tokens}.get(rank, 0)
        assert tokens == expected
    shape = model_shape(tiny("llama").config, "float32")
    with attention_counts():
        predicted = traffic.phase1_cp(
            shape, plan, tokens_per_forward=forward, balance_ranks=balance_ranks
        )
    assert [wire for _, wire in results] == [predicted] * ranks


def test_tensor_parallel_ranks_are_helped_by_those_with_the_same_heads(
    pool: Pool, models: Path
) -> None:
    path = on_disk(models, "llama")
    settings: dict[str, Any] = dict(block_size=16, anchor_size=16, tokens_per_forward=16)
    results = pool.run(answer_sharded, 4, path=path, **settings)
    check_model(results, tp_model("llama"), 16, 16, tensor_parallel=2)
    shape = model_shape(tp_model("llama").config, "float32")
    plan = BlockPlan(context_tokens=CONTEXT, block_size=16, anchor_size=16, ranks=2)
    with attention_counts():
        assert helps_of_shape(shape, plan, tokens_per_forward=16)
        predicted = traffic.phase1_cp(shape, plan, tokens_per_forward=16, tensor_parallel=2)
    assert [result["wire"] for result in results] == [predicted] * 4


def test_rank_0_computes_nothing_for_others_in_a_batch(pool: Pool) -> None:
    """Ranks pause together there, and would all wait for it; calls after a canceled one may."""
    settings = dict(block_size=16, tokens_per_forward=16)
    (wires, (beside, alone)), _ = pool.run(
        led_helped, 2, session=encode_in_a_batch, settings=settings
    )
    shape = model_shape(tiny("llama").config, "float32")
    plan = BlockPlan(context_tokens=CONTEXT, block_size=16, anchor_size=16, ranks=2)
    with attention_counts():
        expected = [
            traffic.phase1_cp(shape, plan, tokens_per_forward=16, balance_ranks=balance_ranks)
            for balance_ranks in (False, True)
        ]
    assert wires == expected
    assert expected[0].bytes < expected[1].bytes
    torch.testing.assert_close(beside, alone, rtol=0, atol=0)


# ------------------------------------------------------------------ settings and later calls


KINDS = [
    {},
    dict(kv_dtype="fp8"),
    # A block takes four forwards of each context: later ones read what is stored of the earlier.
    dict(kv_dtype="fp8", tokens_per_forward=8),
    dict(kv_device="cpu"),
    dict(anchor_size=7),
    dict(anchor_source="local"),
    dict(balance_ranks=False),
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_shards_have_the_bits_of_one_rank(pool: Pool, settings: dict[str, Any]) -> None:
    parts = pool.run(encode_helped, 2, settings=settings)
    alone = encode_helped(SoloComm(), settings)
    # Rank 0 has the first blocks, and rank 1 those after them.
    for first, second, whole in zip(*parts, alone, strict=True):
        for layers in zip(first, second, whole, strict=True):
            for name in (0, 1):
                left, right, expected = (
                    torch.cat([run[name] for run in runs], 2) for runs in layers
                )
                assert torch.equal(torch.cat([left, right], 2), expected)


def test_a_saved_context_has_them_too(pool: Pool, tmp_path: Path) -> None:
    book = tmp_path / "book.star"
    parts = pool.run(encode_helped, 2, settings={}, book=book)
    loaded = StarLLM(tiny("llama"), block_size=16).load_context(book)
    (whole,) = shards([loaded])
    for first, second, ((keys, values),) in zip(parts[0][1], parts[1][1], whole, strict=True):
        assert torch.equal(torch.cat([first[0][0], second[0][0]], 2), keys)
        assert torch.equal(torch.cat([first[0][1], second[0][1]], 2), values)


@pytest.mark.slow
def test_compiled_layers_are_split_too(pool: Pool) -> None:
    parts = pool.run(encode_helped, 2, settings=dict(compile=True), compiled=True)
    alone = pool.run(encode_helped, 2, settings=dict(compile=False))
    for actual, expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
