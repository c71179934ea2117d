"""Rows of equal settings share what transformers prepares; others have their own."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.generation.batching import processing
from tests.engines import engine, ids

SAMPLED: dict[str, Any] = dict(do_sample=True, temperature=0.7, top_k=20, seed=1)


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The token counts of the texts that transformers prepared."""
    from star_attention import phase2

    lengths: list[int] = []
    stock = phase2.prepare

    def prepare(request: Any, cache: Any) -> Any:
        result = stock(request, cache)
        lengths.append(result[0].shape[1])
        return result

    monkeypatch.setattr(phase2, "prepare", prepare)
    return lengths


def answered(star: StarLLM, context: Any, **settings: Any) -> list[int]:
    batch = star.batch()
    row = batch.add(context, ids(4, seed=3), max_new_tokens=6, ignore_eos=True, **settings)
    tokens = row.result().token_ids
    batch.close()
    return tokens


def test_equal_settings_are_prepared_once(prepared: list[int]) -> None:
    star = engine("llama", block_size=16)
    contexts = [star.encode(ids(length, seed=length)) for length in (40, 50)]
    expected = [
        star.generate(
            context, ids(4, seed=3), max_new_tokens=6, ignore_eos=True, **settings
        ).token_ids
        for settings in ({}, SAMPLED)
        for context in contexts
    ]
    processing._known.clear()
    prepared.clear()
    for _ in range(2):
        tokens = [
            answered(star, context, **settings)
            for settings in ({}, SAMPLED)
            for context in contexts
        ]
        assert tokens == expected
    # One text for each of the settings.
    assert prepared == [44, 44]


def test_other_settings_are_prepared_anew(
    prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(40))
    greedy, sampled = answered(star, context), answered(star, context, **SAMPLED)
    prepared.clear()
    assert answered(star, context, **(SAMPLED | {"temperature": 9.0})) != sampled
    # The model's own settings may be edited.
    monkeypatch.setattr(star.model.generation_config, "do_sample", True)
    monkeypatch.setattr(star.model.generation_config, "temperature", 9.0)
    assert answered(star, context, seed=1) not in (greedy, sampled)
    assert len(prepared) == 2
    with pytest.raises(InvalidInputError, match="temperature"):
        answered(star, context, **(SAMPLED | {"temperature": -1.0}))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"logits_processor": LogitsProcessorList([Nothing()])},
    ],
    ids=["penalty", "repeats", "a user's"],
)
def test_what_reads_the_text_is_of_one_row(prepared: list[int], settings: dict[str, Any]) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(40))
    for _ in range(2):
        answered(star, context, **settings)
    assert len(prepared) == 2
