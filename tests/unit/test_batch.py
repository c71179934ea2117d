"""Batches: rows that come and go answer as `generate` answers each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import engine, ids
from tests.families import FAMILIES, UNUSUAL
from tests.row_mixes import assert_same, check_mix

DEFAULT = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]


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


def test_without_a_seed_numbers_are_of_the_global_generator() -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    settings: dict[str, Any] = dict(do_sample=True, max_new_tokens=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = star.generate(context, ids(5), **settings)
        answers = []
        for _ in range(2):
            torch.manual_seed(3)
            with star.batch() as batch:
                assert_same(batch.add(context, ids(5), **settings).result(), expected)
                rows = [batch.add(context, ids(5), **settings) for _ in range(3)]
                seeded = batch.add(context, ids(5), seed=11, **settings)
                answers.append([row.result().token_ids for row in rows])
                assert_same(seeded.result(), star.generate(context, ids(5), seed=11, **settings))
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) == 3


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
