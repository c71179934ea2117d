"""Batches: rows that come and go answer as `generate` answers each alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext, Generation, StarLLM
from tests.engines import engine, ids
from tests.families import FAMILIES, UNUSUAL

DEFAULT = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]


class Favor(LogitsProcessor):
    """Adds to the score of the token that follows, in number, the last one: it reads the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, (input_ids[:, -1] + 1) % scores.shape[1]] += 3.0
        return scores


def some_settings(chance: random.Random) -> dict[str, Any]:
    """Return settings of one row."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": chance.randrange(100)},
        {"do_sample": True, "top_k": 0, "seed": chance.randrange(100)},
        {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "seed": chance.randrange(100)},
        {"repetition_penalty": 1.3},
        {"logits_processor": LogitsProcessorList([Favor()])},
        {"logprobs": 2, "return_logits": True},
        {"sources": 2},
        {"min_new_tokens": 3},
    ]
    return {"max_new_tokens": chance.randrange(1, 14), **chance.choice(kinds)}


def assert_same(actual: Generation, expected: Generation) -> None:
    assert actual.token_ids == expected.token_ids
    assert actual.text == expected.text
    assert actual.finish_reason == expected.finish_reason
    assert actual.query_tokens == expected.query_tokens
    if expected.logits is not None:
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=0)
    if expected.logprobs is not None:
        assert actual.logprobs is not None
        for own, other in zip(actual.logprobs, expected.logprobs, strict=True):
            assert (own.id, own.logprob) == (other.id, pytest.approx(other.logprob, abs=1e-4))
    if expected.sources is not None:
        assert actual.sources is not None
        spans = [(source.start, source.stop) for source in actual.sources]
        assert spans == [(source.start, source.stop) for source in expected.sources]


def check_mix(
    star: StarLLM, contexts: list[EncodedContext], *, rows: int, seed: int, **more: Any
) -> None:
    """Add rows between steps, cancel some, and compare the others with `generate`."""
    chance = random.Random(seed)
    jobs = [
        (
            chance.choice(contexts),
            ids(chance.choice([1, 2, 5, 9, 20]), seed=chance.randrange(1000)),
            some_settings(chance) | more,
        )
        for _ in range(rows)
    ]
    running: list[tuple[int, Any]] = []
    with star.batch(max_rows=4) as batch:
        for number, (context, query, settings) in enumerate(jobs):
            running.append((number, batch.add(context, query, **settings)))
            for _ in range(chance.randrange(3)):
                batch.step()
            if chance.random() < 0.15:
                chance.choice(running)[1].cancel()
        results = [(number, row, row.result()) for number, row in running]
    canceled = 0
    for number, _, result in results:
        context, query, settings = jobs[number]
        expected = star.generate(context, query, **settings)
        if result.finish_reason == "canceled":
            canceled += 1
            assert result.token_ids == expected.token_ids[: len(result.token_ids)]
        else:
            assert_same(result, expected)
    assert canceled < rows / 2


@pytest.mark.parametrize(
    "name",
    [
        *DEFAULT,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in [*FAMILIES, *UNUSUAL]
            if name not in DEFAULT
        ),
    ],
)
def test_any_mix_of_rows_equals_single_answers(name: str) -> None:
    star = engine(name, block_size=16)
    contexts = [star.encode(ids(length, seed=length)) for length in (70, 45)]
    check_mix(star, contexts, rows=14, seed=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "streaming_llm", "block_size": 20, "anchor_size": 3},
        {"kv_dtype": "fp8"},
        {"kv_device": "cpu"},
        {"lookback": 1, "lookback_layers": "lower"},
        {"method": "dense"},
    ],
    ids=str,
)
def test_rows_of_every_kind_of_context(settings: dict[str, Any]) -> None:
    star = engine("mistral", **({"block_size": 16} | settings))
    contexts = [star.encode(ids(length, seed=length)) for length in (70, 45)]
    check_mix(star, contexts, rows=8, seed=5)


def test_rows_of_contexts_that_cannot_share_forwards(tmp_path: Path) -> None:
    """Contexts in several formats, one of them of a file, one batch."""
    star = engine("llama", block_size=16)
    star.encode(ids(50, seed=9)).save(tmp_path / "c.star")
    contexts = [
        star.encode(ids(70)),
        star.with_config(kv_dtype="fp8").encode(ids(45, seed=2)),
        star.load_context(tmp_path / "c.star"),
    ]
    check_mix(star, contexts, rows=10, seed=6)


def test_second_looks_are_of_each_row() -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    check_mix(star, [context], rows=6, seed=7, second_look=0.3)


def test_a_seed_gives_the_same_answer_in_any_company() -> None:
    star = engine("llama", block_size=16)
    context, other = star.encode(ids(70)), star.encode(ids(45, seed=2))
    settings: dict[str, Any] = dict(do_sample=True, seed=11, max_new_tokens=12, return_logits=True)
    expected = star.generate(context, ids(5), **settings)
    for company in range(4):
        with star.batch() as batch:
            for number in range(company):
                batch.add(other, ids(3 + number), do_sample=True, max_new_tokens=20)
                batch.step()
            assert_same(batch.add(context, ids(5), **settings).result(), expected)


def test_rows_wait_for_their_turn_in_order() -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    with star.batch(max_rows=2) as batch:
        rows = [batch.add(context, ids(4), max_new_tokens=3, ignore_eos=True) for _ in range(5)]
        assert (batch.running, batch.waiting) == (0, 5)
        batch.step()
        assert (batch.running, batch.waiting) == (2, 3)
        assert [len(row.token_ids) for row in rows] == [1, 1, 0, 0, 0]
        ended = [row for row, _ in batch if row.done]
        assert ended == rows
        assert (batch.running, batch.waiting) == (0, 0)
