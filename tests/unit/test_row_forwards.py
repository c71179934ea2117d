"""Decode forwards of rows of different contexts: the logits of each row are those of it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution.rows import RowForwards, kind_of
from tests.decode_rows import prefilled, step
from tests.engines import VARIED, engine, ids

STEPS = 3


@pytest.mark.parametrize(
    "name", [name for name in VARIED if name not in ("deepseek_v3", *VARIED[-2:])]
)
def test_rows_of_two_contexts_are_as_alone(name: str) -> None:
    star = engine(name, block_size=16)
    first, second = star.encode(ids(70)), star.encode(ids(45, seed=2))
    rows = [
        *prefilled(star, first, ids(4, seed=3), ids(9, seed=4)),
        *prefilled(star, second, ids(30, seed=5)),
    ]
    forwards = RowForwards(star.runtime.handle, star.runtime.comm)
    row_set = RowSet([row.kv for row in rows])
    assert row_set.groups == [(0, 2), (2, 3)]
    for number in range(STEPS):
        if number == 2:
            # A row leaves.
            del rows[0]
            row_set = RowSet([row.kv for row in rows])
        logits_RV = step(forwards, rows, number, row_set)
        expected_RV = torch.stack([row.logits_SV[number + 1] for row in rows])
        torch.testing.assert_close(logits_RV, expected_RV, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "streaming_llm", "block_size": 20, "anchor_size": 3},
        {"kv_dtype": "fp8"},
        {"kv_device": "cpu"},
    ],
    ids=str,
)
def test_stored_formats_and_visible_parts(settings: dict[str, Any]) -> None:
    star = engine("mistral", **({"block_size": 16} | settings))
    context = star.encode(ids(70))
    rows = prefilled(star, context, ids(4, seed=3), ids(9, seed=4))
    forwards = RowForwards(star.runtime.handle, star.runtime.comm)
    row_set = RowSet([row.kv for row in rows])
    for number in range(STEPS):
        logits_RV = step(forwards, rows, number, row_set)
        expected_RV = torch.stack([row.logits_SV[number + 1] for row in rows])
        torch.testing.assert_close(logits_RV, expected_RV, atol=1e-4, rtol=0)


def test_the_version_is_that_of_membership_and_buffers() -> None:
    star = engine("llama", block_size=16)
    (row,) = prefilled(star, star.encode(ids(70)), ids(4, seed=3))
    row_set = RowSet([row.kv])
    version = row_set.version
    assert row_set.version == version
    assert RowSet([row.kv]).version != version
    forwards = RowForwards(star.runtime.handle, star.runtime.comm)
    step(forwards, [row], 0, row_set)
    assert row_set.version == version, "the tail had room"
    while row.kv.tail_tokens < 64:
        step(forwards, [row], 0, row_set)
    step(forwards, [row], 0, row_set)
    assert row_set.version != version


def test_layers_that_expand_their_keys_run_alone() -> None:
    star = engine("deepseek_v3", block_size=16)
    context = star.encode(ids(70))
    assert kind_of(context.kv, None) is None
    llama = engine("llama", block_size=16)
    kinds = [kind_of(llama.encode(ids(length)).kv, None) for length in (20, 70)]
    assert kinds[0] == kinds[1] is not None
