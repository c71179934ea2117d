"""Look-back: blocks also see blocks before them. Laws, formats, files, extension, bad input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.config import StarConfig
from star_attention.errors import ContextMismatchError, InvalidInputError, SizeError
from star_attention.planning.lookback import layer_numbers, parse_layers
from tests import families
from tests.engines import BUNDLED, CONTEXT, QUERY, engine, ids, stored

FAMILIES = ["llama", "gemma3", "deepseek_v3"]
OTHERS = sorted({*families.FAMILIES, *families.UNUSUAL} - set(FAMILIES))


def assert_same(a: Any, b: Any, *, atol: float = 2e-5) -> None:
    for layer, other in zip(stored(a), stored(b), strict=True):
        for x, y in zip(layer, other, strict=True):
            torch.testing.assert_close(x.float(), y.float(), atol=atol, rtol=0)


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_enough_lookback_is_dense(name: str) -> None:
    """Of seven blocks, the last sees the six before it: six are enough, and more are no harm."""
    dense = engine(name, method="dense").encode(ids(CONTEXT))
    for lookback, tokens_per_forward in ((6, 9), (6, 40), (9, 1000)):
        star = engine(name, block_size=16, lookback=lookback, tokens_per_forward=tokens_per_forward)
        assert_same(star.encode(ids(CONTEXT)), dense, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_lookback_nothing_changes(name: str) -> None:
    """Bit for bit: the layers that would look back are the paper's."""
    paper = engine(name, block_size=16, tokens_per_forward=40).encode(ids(CONTEXT))
    none = engine(name, block_size=16, tokens_per_forward=40, lookback=0, lookback_layers="lower")
    assert_same(none.encode(ids(CONTEXT)), paper, atol=0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_extended_context_equals_a_fresh_one(name: str) -> None:
    star = engine(name, block_size=16, tokens_per_forward=40, lookback=2, lookback_layers="lower")
    whole = star.encode(ids(CONTEXT))
    for cut in (5, 16, 37, 60):
        extended = star.extend(star.encode(ids(CONTEXT)[:cut]), ids(CONTEXT)[cut:])
        assert extended.plan == whole.plan
        assert_same(extended, whole)


@pytest.mark.parametrize("settings", [{"kv_dtype": "fp8"}, {"kv_device": "cpu"}], ids=str)
def test_blocks_read_what_was_computed_whatever_the_format(settings: dict[str, Any]) -> None:
    """Not rounded keys, so that forwards of any size give the same."""
    first: Any = None
    for tokens_per_forward in (16, 40, 1000):
        star = engine(
            "llama", block_size=16, lookback=2, tokens_per_forward=tokens_per_forward, **settings
        )
        context = star.encode(ids(CONTEXT))
        first = first or context
        # A key near the middle between two fp8 numbers may be rounded to either.
        assert_same(context, first, atol=0.1 if "kv_dtype" in settings else 2e-5)
        mean = torch.stack(
            [
                (a.float() - b.float()).abs().mean()
                for layer, other in zip(stored(context), stored(first), strict=True)
                for a, b in zip(layer, other, strict=True)
            ]
        ).mean()
        assert mean < 1e-4


def test_contexts_in_a_batch_equal_single_ones() -> None:
    star = engine("llama", block_size=16, tokens_per_forward=100, lookback=2)
    texts = [ids(CONTEXT, seed=seed) for seed in (3, 4)]
    for context, text in zip(star.encode(texts), texts, strict=True):
        assert_same(context, star.encode(text))


def test_a_saved_context_answers_as_before_and_refuses_another_lookback(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"block_size": 16, "lookback": 2, "lookback_layers": [0, 2]}
    star = engine("llama", **settings)
    context = star.encode(ids(CONTEXT))
    context.save(tmp_path / "book.star")
    loaded = engine("llama", **settings).load_context(tmp_path / "book.star")
    assert loaded.plan == context.plan
    assert "look-back 2 in layers 0+2" in repr(loaded)
    asked = [star.generate(c, ids(QUERY), max_new_tokens=4) for c in (context, loaded)]
    assert asked[0].token_ids == asked[1].token_ids
    extended = star.extend(loaded, ids(9))
    assert_same(extended, star.encode(ids(CONTEXT) + ids(9)))
    with pytest.raises(ContextMismatchError, match="lookback: 2 in layers 0\\+2 in the context, 0"):
        engine("llama", block_size=16).load_context(tmp_path / "book.star")


def test_the_anchor_is_a_sink_by_default() -> None:
    plan = StarConfig(block_size=4096, lookback=2).plan(100_000)
    assert plan.anchor_size == 64
    assert StarConfig(block_size=32, lookback=2).plan(100_000).anchor_size == 32
    assert StarConfig(block_size=4096, anchor_size=4096, lookback=2).plan(9).anchor_size == 4096


@pytest.mark.parametrize(
    ("layers", "spelling", "numbers"),
    [
        ("all", "all", [0, 1, 2, 3, 4]),
        (" Lower", "lower", [0, 1, 2]),
        ("upper", "upper", [3, 4]),
        (0.5, "lower", [0, 1, 2]),
        (0.4, "0.4", [0, 1]),
        ("0.01", "0.01", [0]),
        (1.0, "all", [0, 1, 2, 3, 4]),
        (1, "1", [1]),
        ([3, 0, 1], "0-1+3", [0, 1, 3]),
        (range(4), "0-3", [0, 1, 2, 3]),
        ("4, 0-1", "0-1+4", [0, 1, 4]),
    ],
)
def test_layers_are_named_in_several_ways(layers: Any, spelling: str, numbers: list[int]) -> None:
    assert parse_layers(layers) == spelling
    assert parse_layers(spelling) == spelling
    assert sorted(layer_numbers(spelling, 5)) == numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lookback": -1}, "lookback -1 is not a number of blocks"),
        ({"lookback": 1.5}, r"lookback 1\.5 is not a number of blocks"),
        ({"lookback": "two"}, "lookback 'two' is not a number of blocks"),
        ({"lookback_layers": "middle"}, "lookback_layers 'middle' names no layers"),
        ({"lookback_layers": 1.5}, r"lookback_layers 1\.5 names no layers"),
        ({"lookback_layers": []}, r"lookback_layers \[\] names no layers"),
        ({"lookback_layers": [-1]}, r"lookback_layers \[-1\] names no layers"),
        ({"lookback_layers": "5-2"}, "lookback_layers '5-2' names no layers"),
        # No billion of numbers is listed to find that out.
        ({"lookback_layers": "0-9999999999"}, "lookback_layers '0-9999999999' names no layers"),
        ({"lookback_layers": itertools.count()}, r"lookback_layers count\(0\) names no layers"),
        ({"lookback_layers": object}, "lookback_layers <class 'object'> names no layers"),
        ({"lookback_layers": b"all"}, "lookback_layers b'all' names no layers"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((SizeError, InvalidInputError), match=message):
        StarConfig(**settings)


@pytest.mark.parametrize("method", ["dense", "ring", "streaming_llm"])
def test_methods_without_blocks_refuse_it(method: str) -> None:
    star = engine("llama", lookback=1)
    with pytest.raises(InvalidInputError, match=f"lookback 1 does not work with method '{method}'"):
        star.with_config(method=method)
    assert star.with_config(method=method, lookback=0).config.method == method


def test_methods_without_blocks_refuse_it_before_a_model_is_looked_for() -> None:
    with pytest.raises(InvalidInputError, match="lookback 2 does not work with method 'dense'"):
        StarLLM.from_pretrained("/nowhere/model", quality="balanced", method="dense")


def test_layers_that_do_not_exist_are_refused_when_the_engine_is_made() -> None:
    with pytest.raises(
        InvalidInputError, match="contains layer 40, and the model has layers 0 to 9"
    ):
        StarLLM.from_pretrained(BUNDLED, lookback=1, lookback_layers="0-40")
