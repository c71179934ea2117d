"""Other anchors: what stands in front of a block is what the model sees there, and the first block's own is Star Attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.evals.runs import ablations
from tests.engines import bundled_model, bundled_tokenizer, engine, ids, tiny
from tests.model_oracle import cached, cached_kv, eager_attention

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=16)
TOKENS = 101


def assert_same_kv(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours.kv.layers, theirs.kv.layers, strict=True):
        for x, y in zip(a.pair(), b.pair(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_the_first_block_where_it_stands_is_star_attention(name: str) -> None:
    star = engine(name, **SIZES)
    assert_same_kv(ablations.encode(star, ids(TOKENS)), star.encode(ids(TOKENS)))


def test_keys_and_values_are_kept_as_the_engine_says() -> None:
    star = engine("llama", **(SIZES | {"tokens_per_forward": 48}), kv_dtype="fp8")
    other, own = ablations.encode(star, ids(TOKENS)), star.encode(ids(TOKENS))
    assert other.kv.kv_format == own.kv.kv_format
    assert other.kv.nbytes == own.kv.nbytes
    for a, b in zip(other.kv.layers, own.kv.layers, strict=True):
        for x, y in zip(a.pair(), b.pair(), strict=True):
            moved = ((x - y).abs() > 1e-4).float().mean()  # (rounded the other way)
            assert moved < 0.001


def test_no_anchor_is_star_attention_without_one() -> None:
    star, bare = engine("llama", **SIZES), engine("llama", **(SIZES | {"anchor_size": 0}))
    assert_same_kv(ablations.encode(star, ids(TOKENS), anchor="none"), bare.encode(ids(TOKENS)))


@torch.no_grad()
def seen(model: Any, tokens: list[int], places: list[int]) -> list[Any]:
    """Keys and values of tokens at positions, by one plain forward."""
    cache = DynamicCache()
    with eager_attention(model):
        model(
            torch.tensor([tokens]),
            position_ids=torch.tensor([places]),
            use_cache=True,
            **cached(model, cache),
        )
    return cached_kv(cache)


@pytest.mark.parametrize(
    ("anchor", "positions"),
    [("previous-block", "previous-block"), ("shuffled", "first-block"), ("first-block", "random")],
)
def test_a_block_sees_just_what_stands_in_front_of_it(
    anchor: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    star, tokens = engine("llama", **SIZES), ids(TOKENS)
    stood: dict[int, Any] = {}
    stock_content, stock_places = ablations._content, ablations._places

    def content(star: StarLLM, ids_L: Any, anchor: str, start: int, *rest: Any) -> Any:
        stood[start] = [stock_content(star, ids_L, anchor, start, *rest)]
        return stood[start][0]

    def places(positions: str, start: int, *rest: Any) -> Any:
        stood[start].append(stock_places(positions, start, *rest))
        return stood[start][1]

    monkeypatch.setattr(ablations, "_content", content)
    monkeypatch.setattr(ablations, "_places", places)
    context = ablations.encode(star, tokens, anchor=anchor, positions=positions)
    assert sorted(stood) == [24, 48, 72, 96]
    for start, (front, where) in stood.items():
        stop = min(start + 24, TOKENS)
        plain = seen(
            star.model,
            [*front.tolist(), *tokens[start:stop]],
            [*where.tolist(), *range(start, stop)],
        )
        for layer, (k, v) in zip(context.kv.layers, plain, strict=True):
            for ours, theirs in zip(layer.slice(start, stop), (k, v), strict=True):
                torch.testing.assert_close(ours, theirs[:, :, 10:], atol=1e-4, rtol=1e-4)


def test_what_stands_there() -> None:
    import random

    star = StarLLM(bundled_model(), bundled_tokenizer(), block_size=64)
    ids_L = torch.tensor(ids(300))
    made = {
        name: ablations._content(star, ids_L, name, 128, 32, " the", random.Random(0)).tolist()
        for name in ablations.CONTENTS
        if name != "none"
    }
    head = ids_L[:32].tolist()
    assert made["first-block"] == head
    assert made["shuffled"] != head
    assert sorted(made["shuffled"]) == sorted(head)
    assert made["previous-block"] == ids_L[96:128].tolist()
    assert len(set(made["constant"])) == 1
    assert len(set(made["random"])) > 16
    assert not set(made["random"]) & set(star.tokenizer.all_special_ids)
    where = {
        name: ablations._places(name, 128, 32, random.Random(0)).tolist()
        for name in ablations.POSITIONS
    }
    assert where["first-block"] == [*range(32)]
    assert where["previous-block"] == [*range(96, 128)]
    assert where["random"] == sorted({*where["random"]})
    assert len(where["random"]) == 32
    assert where["random"][-1] < 128


def test_answers_run_on_it_and_repeat() -> None:
    star = engine("llama", **SIZES)
    first, second, other = (
        ablations.encode(star, ids(TOKENS), anchor="random", seed=seed) for seed in (1, 1, 2)
    )
    logits = [star.logits(context, ids(5)) for context in (first, second, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("anchor", "positions"),
    [("random", "first-block"), ("shuffled", "first-block"), ("first-block", "random")],
)
def test_what_is_random_is_drawn_for_each_context(
    anchor: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One draw for all contexts would measure that draw. (The contexts differ in their last token alone.)"""
    drawn: list[list[int]] = []
    content, places = ablations._content, ablations._places

    def note(made: Any) -> Any:
        drawn[-1].extend(made.tolist())
        return made

    monkeypatch.setattr(ablations, "_content", lambda *given: note(content(*given)))
    monkeypatch.setattr(ablations, "_places", lambda *given: note(places(*given)))
    star, tokens = engine("llama", **SIZES), ids(TOKENS)
    for context in (tokens, tokens, [*tokens[:-1], tokens[-1] - 1]):
        drawn.append([])
        ablations.encode(star, context, anchor=anchor, positions=positions)
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_ablated() -> None:
    star = engine("llama", **SIZES)
    with pytest.raises(
        InvalidInputError, match="anchor 'middle' is unknown; choose one of first-block, none"
    ):
        ablations.encode(star, ids(50), anchor="middle")
    with pytest.raises(
        InvalidInputError,
        match="anchor 'end' is unknown; choose one of first-block, previous-block",
    ):
        ablations.encode(star, ids(50), positions="end")
    with pytest.raises(InvalidInputError, match="need method 'star' on one rank"):
        ablations.encode(StarLLM(tiny("llama"), method="dense"), ids(50))
    with pytest.raises(InvalidInputError, match="depend on the length"):
        ablations.encode(engine("phi3_longrope", **SIZES), ids(50))
