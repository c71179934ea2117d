"""Decode forwards of rows of different contexts: the logits of each row are those of it alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from star_attention.attention.attend import Rule, attend
from star_attention.hf.cache.packed_tails import Lengths, PackedTails
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution.rows import RowForwards, kind_of
from star_attention.storage.tail import Tail
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
    for name, alone in (("jetmoe", True), ("deepseek_v3", False)):
        star = engine(name, block_size=16)
        kind = kind_of(star.runtime.handle, star.encode(ids(70)).kv, None)
        assert (kind is None) == alone
    llama = engine("llama", block_size=16)
    handle = llama.runtime.handle
    kinds = [kind_of(handle, llama.encode(ids(length)).kv, None) for length in (20, 70)]
    assert kinds[0] == kinds[1] is not None


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 7, 30], [40, 63, 50], [2, 2, 400]], ids=str)
def test_packed_tails_attend_as_each_tail(lengths: list[int], window: int | None) -> None:
    """Tails of very different lengths stay apart; those that outgrow their buffers are moved."""
    torch.manual_seed(0)
    rows, heads, kv_heads, size = len(lengths), 6, 3, 16
    tails = [Tail() for _ in range(rows)]
    for tail, length in zip(tails, lengths, strict=True):
        tail.append(*torch.randn(2, 1, kv_heads, length, size))
    packed = PackedTails.of(tails, Lengths())
    assert (packed is None) == (lengths[-1] == 400)
    if packed is None:
        return
    rule = Rule(scale=0.3)
    for _ in range(4):
        if packed.is_full:
            assert lengths[1] == 63
            packed = PackedTails.of(tails, Lengths())
            assert packed is not None
        new_RG1D = torch.randn(2, rows, kv_heads, 1, size)
        packed.append(*new_RG1D)
        q_R1HD = torch.randn(rows, 1, heads, size)
        state = packed.attend(q_R1HD, rule, [window] * rows)
        for row, tail in enumerate(tails):
            k_1GKD, v_1GKD = tail.pair()
            assert torch.equal(k_1GKD[0, :, -1:], new_RG1D[0, row])
            alone = attend(
                q_R1HD[row : row + 1],
                k_1GKD.transpose(1, 2),
                v_1GKD.transpose(1, 2),
                rule=replace(rule, window=window),
                offset=tail.length - 1,
            )
            torch.testing.assert_close(state.out_BQHD[row], alone.out_BQHD[0])
            torch.testing.assert_close(state.lse_BQH[row], alone.lse_BQH[0])


@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 3, 1]])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [2, 0], [1, 1, 1, 2]])
def test_rows_of_a_group_take_over_its_tails(numbers: list[int], padding: list[int]) -> None:
    """In one buffer, as it would be row by row; none moves for a while, nor changes another."""
    group = Tail()
    group.append(torch.randn(3, 2, 70, 4), torch.randn(3, 2, 70, 8))
    taken = group.rows(numbers, padding, 10)
    assert len({tail.buffers()[0].untyped_storage().data_ptr() for tail in taken}) == 1
    new = torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 8)
    for number, tail in zip(numbers, taken, strict=True):
        wanted = group.row(number, padding[number])
        assert tail.length == wanted.length == 70 - padding[number]
        version = tail.version
        for own in (tail, wanted):
            own.append(*new)
        assert tail.version == version
        assert all(buffer.is_contiguous() for buffer in tail.buffers())
        for tensor, expected in zip(tail.pair(), wanted.pair(), strict=True):
            assert torch.equal(tensor, expected)
    assert [tail.length for tail in Tail().rows(numbers, padding, 10)] == [0] * len(numbers)
