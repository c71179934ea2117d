"""Other anchors: a block sees its anchor; with the first block's head it is Star Attention."""

from __future__ import annotations

import random
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


def assert_same_kv(actual: Any, expected: Any) -> None:
    for a, b in zip(actual.kv.layers, expected.kv.layers, strict=True):
        for x, y in zip(a.pair(), b.pair(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_the_first_blocks_head_at_its_positions_is_star_attention(name: str) -> None:
    star = engine(name, **SIZES)
    assert_same_kv(ablations.encode(star, ids(TOKENS)), star.encode(ids(TOKENS)))


def test_kv_is_stored_in_the_engines_format() -> None:
    star = engine("llama", **(SIZES | {"tokens_per_forward": 48}), kv_dtype="fp8")
    other, own = ablations.encode(star, ids(TOKENS)), star.encode(ids(TOKENS))
    assert other.kv.kv_format == own.kv.kv_format
    assert other.kv.nbytes == own.kv.nbytes
    for a, b in zip(other.kv.layers, own.kv.layers, strict=True):
        for x, y in zip(a.pair(), b.pair(), strict=True):
            # A few elements are rounded the other way.
            differing = ((x - y).abs() > 1e-4).float().mean()
            assert differing < 0.001


def test_no_anchor_is_star_attention_without_one() -> None:
    star, bare = engine("llama", **SIZES), engine("llama", **(SIZES | {"anchor_size": 0}))
    assert_same_kv(ablations.encode(star, ids(TOKENS), anchor="none"), bare.encode(ids(TOKENS)))


@torch.no_grad()
def plain_kv(model: Any, tokens: list[int], positions: list[int]) -> list[Any]:
    """Keys and values of tokens at positions, from one plain forward."""
    cache = DynamicCache()
    with eager_attention(model):
        model(
            torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=True,
            **cached(model, cache),
        )
    return cached_kv(cache)


@pytest.mark.parametrize(
    ("anchor", "positions"),
    [("previous-block", "previous-block"), ("shuffled", "first-block"), ("first-block", "random")],
)
def test_a_block_sees_only_its_anchor_and_itself(
    anchor: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    star, tokens = engine("llama", **SIZES), ids(TOKENS)
    anchors: dict[int, Any] = {}
    original_ids, original_positions = ablations.anchor_ids, ablations.anchor_positions

    def anchor_ids(content: str, ids_L: Any, start: int, *rest: Any) -> Any:
        anchors[start] = [original_ids(content, ids_L, start, *rest)]
        return anchors[start][0]

    def anchor_positions(positions: str, start: int, *rest: Any) -> Any:
        anchors[start].append(original_positions(positions, start, *rest))
        return anchors[start][1]

    monkeypatch.setattr(ablations, "anchor_ids", anchor_ids)
    monkeypatch.setattr(ablations, "anchor_positions", anchor_positions)
    context = ablations.encode(star, tokens, anchor=anchor, positions=positions)
    assert sorted(anchors) == [24, 48, 72, 96]
    for start, (ids_A, positions_A) in anchors.items():
        stop = min(start + 24, TOKENS)
        plain = plain_kv(
            star.model,
            [*ids_A.tolist(), *tokens[start:stop]],
            [*positions_A.tolist(), *range(start, stop)],
        )
        for layer, (k, v) in zip(context.kv.layers, plain, strict=True):
            for actual, expected in zip(layer.slice(start, stop), (k, v), strict=True):
                torch.testing.assert_close(actual, expected[:, :, 10:], atol=1e-4, rtol=1e-4)


def test_ids_and_positions_of_every_anchor() -> None:
    star = StarLLM(bundled_model(), bundled_tokenizer(), block_size=64)
    ids_L = torch.tensor(ids(300))
    vocab_size = star.model.config.vocab_size
    anchors = {
        content: ablations.anchor_ids(
            content, ids_L, 128, 32, random.Random(0), star.tokenizer, vocab_size
        ).tolist()
        for content in ablations.CONTENTS
        if content != "none"
    }
    head = ids_L[:32].tolist()
    assert anchors["first-block"] == head
    assert anchors["shuffled"] != head
    assert sorted(anchors["shuffled"]) == sorted(head)
    assert anchors["previous-block"] == ids_L[96:128].tolist()
    assert len(set(anchors["constant"])) == 1
    assert len(set(anchors["random"])) > 16
    assert not set(anchors["random"]) & set(star.tokenizer.all_special_ids)
    positions = {
        name: ablations.anchor_positions(name, 128, 32, random.Random(0)).tolist()
        for name in ablations.POSITIONS
    }
    assert positions["first-block"] == [*range(32)]
    assert positions["previous-block"] == [*range(96, 128)]
    assert positions["random"] == sorted({*positions["random"]})
    assert len(positions["random"]) == 32
    assert positions["random"][-1] < 128


def test_ablated_contexts_are_answered_and_repeat() -> None:
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
def test_random_anchors_are_drawn_for_each_context(
    anchor: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids a single draw for all contexts: the result would depend on that draw.

    The contexts differ in their last token only.
    """
    drawn: list[list[int]] = []
    original_ids, original_positions = ablations.anchor_ids, ablations.anchor_positions

    def record(values: Any) -> Any:
        drawn[-1].extend(values.tolist())
        return values

    monkeypatch.setattr(ablations, "anchor_ids", lambda *args: record(original_ids(*args)))
    monkeypatch.setattr(
        ablations, "anchor_positions", lambda *args: record(original_positions(*args))
    )
    star, tokens = engine("llama", **SIZES), ids(TOKENS)
    for context in (tokens, tokens, [*tokens[:-1], tokens[-1] - 1]):
        drawn.append([])
        ablations.encode(star, context, anchor=anchor, positions=positions)
    assert drawn[0] == drawn[1] != drawn[2]


def test_engines_that_cannot_be_ablated_are_refused() -> None:
    star = engine("llama", **SIZES)
    with pytest.raises(
        InvalidInputError, match="anchor 'middle' is unknown; choose one of first-block, none"
    ):
        ablations.encode(star, ids(50), anchor="middle")
    with pytest.raises(
        InvalidInputError,
        match="positions 'end' is unknown; choose one of first-block, previous-block",
    ):
        ablations.encode(star, ids(50), positions="end")
    with pytest.raises(InvalidInputError, match="need method 'star' on one rank"):
        ablations.encode(StarLLM(tiny("llama"), method="dense"), ids(50))
    with pytest.raises(InvalidInputError, match="depend on the length"):
        ablations.encode(engine("phi3_longrope", **SIZES), ids(50))
