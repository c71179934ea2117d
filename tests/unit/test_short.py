"""Without a block size, short contexts that gain nothing from blocks are one block on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from star_attention import StarConfig, StarLLM
from star_attention.bench.prefill.cases import Methods, plan_cases
from star_attention.bench.prefill.contenders import BASELINES
from star_attention.evals.runs.variants import parse
from star_attention.planning.model_shape import AttentionShape, ModelShape
from star_attention.planning.short import chosen_plan
from star_attention.runtime import Runtime
from tests.engines import ids, tiny

SMALL = ModelShape(
    name="135M",
    layers=30,
    hidden_size=576,
    attention=(AttentionShape(heads=9, kv_heads=3, k_head_size=64, v_head_size=64),) * 30,
    kv_elements_by_layer=(384,) * 30,
    kv_scales_per_token=180,
    linear_parameters=106_168_320,
    head_parameters=28_311_552,
    parameters=134_515_008,
    bytes_per_element=2,
)
LARGE = replace(
    SMALL,
    name="8B",
    layers=32,
    hidden_size=4096,
    attention=(AttentionShape(heads=32, kv_heads=8, k_head_size=128, v_head_size=128),) * 32,
    linear_parameters=6_979_321_856,
)


def blocks(tokens: int, shape: ModelShape, device: str = "cuda", **settings: object) -> int:
    config = StarConfig.of(**settings)
    return chosen_plan(config.plan(tokens), config, device, lambda: shape).num_blocks


@pytest.mark.parametrize("tokens", [2048, 4000, 4096, 8192])
def test_a_small_model_takes_one_block_where_it_waits_for_launches(tokens: int) -> None:
    assert blocks(tokens, SMALL) == 1


def test_blocks_remain_where_they_may_be_faster() -> None:
    assert blocks(4096, LARGE) == blocks(8192, LARGE) == 4
    assert blocks(8193, SMALL) > 1, "several forwards, which are compiled"
    assert blocks(4096, SMALL, tokens_per_forward=2048) == 4
    assert blocks(4096, SMALL, "cpu") == 4, "no launches to wait for"


@pytest.mark.parametrize(
    "settings",
    [{"block_size": 1024}, {"anchor_size": 64}, {"lookback": 1}, {"quality": "balanced"}],
)
def test_what_the_user_sets_is_obeyed(settings: dict[str, object]) -> None:
    assert blocks(4096, SMALL, **settings) == 4


def test_the_number_of_ranks_does_not_matter() -> None:
    """Law 2: contexts on one rank and on several are the same."""
    for tokens in (2048, 8192, 8193):
        plans = [
            chosen_plan(StarConfig().plan(tokens, ranks), StarConfig(), "cuda", lambda: SMALL)
            for ranks in (1, 4)
        ]
        assert replace(plans[1], ranks=1) == plans[0]


def test_engines_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which the tests have not."""
    monkeypatch.setattr(Runtime, "device", torch.device("cuda"))
    star = StarLLM(tiny("llama"))
    plan = star.runtime.plan_for(3000)
    assert plan.is_dense
    assert star.runtime.method.describe(plan) == "1 block of 3,000, which is dense attention"
    assert star.with_config(block_size=1024).runtime.plan_for(3000).num_blocks == 3


def test_contexts_of_one_block_say_so() -> None:
    star = StarLLM(tiny("llama"))
    assert repr(star.encode(ids(50))) == "EncodedContext(star, 50 tokens, 1 block: dense)"


def test_evaluations_compare_blocks() -> None:
    """Forbids an evaluation of star that compares dense attention with itself."""
    assert parse("star").sizes(4096) == (1024, None)
    assert parse("dense").sizes(4096) == (None, None)


def test_the_benchmark_measures_the_default() -> None:
    """It has no block size of its own, and is no dense baseline of others."""
    methods = Methods.of(["dense", "default"], [], 1)
    cases = plan_cases([4096, 8192], ["1k"], methods, device="cpu", dense_up_to=4096)
    assert [(case.method, case.block, case.extrapolated) for case in cases] == [
        ("dense", None, False),
        ("default", None, False),
        ("dense", None, True),
        ("default", None, False),
    ]
    assert "dense" in BASELINES
    assert "default" not in BASELINES
