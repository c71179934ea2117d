"""Batches whose rows come and go at random, compared with single answers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext, Generation, StarLLM
from tests.engines import ids


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
