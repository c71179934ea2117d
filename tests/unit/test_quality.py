"""The presets: what they stand for, what comes before them, what they cost, bad input."""

from __future__ import annotations

import json
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError
from star_attention.planning.pairs import context_pairs
from star_attention.planning.plan import BlockPlan
from star_attention.planning.quality import QUALITIES, all_look_back
from tests.command_line import failed, ok
from tests.engines import BUNDLED, engine

BLOCK = 1024


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0, "all", None)),
        ({"quality": None}, (0, "all", None)),
        ({"quality": "paper"}, (0, "all", None)),
        ({"quality": "balanced"}, (2, "lower", None)),
        ({"quality": "high"}, (6, "lower", None)),
        ({"quality": "high", "lookback": 3}, (3, "lower", None)),
        ({"quality": "high", "lookback": 0}, (0, "lower", None)),
        ({"quality": "balanced", "lookback_layers": [0, 1]}, (2, "0-1", None)),
        ({"quality": "balanced", "anchor_size": "1k"}, (2, "lower", 1024)),
    ],
)
def test_a_preset_stands_for_fields(
    settings: dict[str, Any], expected: tuple[int, str, int | None]
) -> None:
    config = StarConfig.of(**settings)
    assert (config.lookback, config.lookback_layers, config.anchor_size) == expected


def test_a_preset_replaces_what_the_engine_had() -> None:
    star = engine("llama", block_size=16, anchor_size=8, lookback=1)
    balanced = star.with_config(quality="balanced").config
    assert (balanced.lookback, balanced.lookback_layers, balanced.anchor_size) == (2, "lower", None)
    paper = star.with_config(quality="paper")
    assert paper.config == engine("llama", block_size=16).config
    assert star.with_config(method="dense", quality="paper").config.method == "dense"


def pairs(blocks: int, **settings: Any) -> float:
    """Pairs of a query and a key that it sees, in the mean of eight layers."""
    plan = StarConfig.of(block_size=BLOCK, **settings).plan(blocks * BLOCK)
    return sum(context_pairs(plan, lookback=lookback) for lookback in plan.lookbacks(8)) / 8


@pytest.mark.parametrize("blocks", [4, 8, 16, 64])
def test_balanced_costs_no_more_than_the_paper(blocks: int) -> None:
    assert pairs(blocks, quality="balanced") <= 1.1 * pairs(blocks, quality="paper")


@pytest.mark.parametrize("quality", ["balanced", "high"])
def test_half_as_far_in_all_layers_costs_the_same(quality: str) -> None:
    """Calibration compares both, and says that they cost the same."""
    far, near = QUALITIES[quality]["lookback"], all_look_back(quality)
    in_all = pairs(64, lookback=near, lookback_layers="all")
    assert in_all == pytest.approx(pairs(64, quality=quality), rel=0.03)
    assert near < far


@pytest.mark.parametrize(("blocks", "share"), [(4, 0.7), (8, 0.6), (16, 0.4), (64, 0.15)])
def test_high_costs_far_less_than_dense(blocks: int, share: float) -> None:
    dense = context_pairs(BlockPlan.dense(blocks * BLOCK))
    assert pairs(blocks, quality="balanced") < pairs(blocks, quality="high") < share * dense


@pytest.mark.parametrize("quality", ["best", "", 2, ["high"], "High"])
def test_unknown_presets_are_refused(quality: Any) -> None:
    with pytest.raises(InvalidInputError, match="is unknown; choose one of paper, balanced, high"):
        StarConfig.of(quality=quality)


@pytest.mark.parametrize("method", ["dense", "ring", "streaming_llm"])
def test_methods_without_blocks_refuse_presets_that_look_back(method: str) -> None:
    message = f"lookback 2 does not work with method '{method}'.*or lookback=0"
    with pytest.raises(InvalidInputError, match=message):
        engine("llama", method=method, quality="balanced")


def test_a_preset_when_a_model_is_loaded() -> None:
    star = StarLLM.from_pretrained(BUNDLED, quality="high", block_size=BLOCK)
    assert (star.config.lookback, star.config.lookback_layers) == (6, "lower")


def planned(*options: str) -> tuple[int, str, int]:
    command = ["plan", "-m", BUNDLED, "--context", "16k", "--block-size", "1k", "--json", *options]
    plan = json.loads(ok(*command).out)
    return plan["lookback"], plan["lookback_layers"], plan["anchor_size"]


def test_on_the_command_line() -> None:
    assert planned() == (0, "all", 1024)
    assert planned("--quality", "balanced") == (2, "lower", 64)
    assert planned("--quality", "high", "--lookback", "1") == (1, "lower", 64)
    assert planned("--quality", "high", "--lookback", "0") == (0, "lower", 1024)
    assert planned("--quality", "balanced", "--lookback-layers", "all") == (2, "all", 64)
    assert planned("--quality", "balanced", "--anchor-size", "512") == (2, "lower", 512)
    line = failed("plan", "-m", BUNDLED, "--context", "16k", "--quality", "best")
    assert line == "error: quality 'best' is unknown; choose one of paper, balanced, high"
