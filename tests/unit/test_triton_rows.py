"""The kernel of rows in Triton's interpreter. tests/gpu/test_rows_cuda.py runs it on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import row_tables
from tests.rows_oracle import CASES, expected, setup, tables

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_rows  # noqa: E402


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, since the interpreter takes a millisecond for each; short runs all the same."""
    monkeypatch.setattr(row_tables, "PROGRAMS", 16)
    monkeypatch.setattr(row_tables, "SHORTEST_RUN", 32)
    monkeypatch.setattr(triton_rows, "TAIL_RUNS", 3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        ("rows of one context", torch.float16),
        ("fp8", torch.float16),
    ],
)
def test_attention_of_rows(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    tensors = setup(case, dtype, "cpu")
    filled, tile_rows = tables(tensors)
    triton_rows.append(tensors.k_RGD, tensors.v_RGD, tables=filled, layer=1)
    for row, (tail, (k_GCD, v_GCD)) in enumerate(zip(case.tails, tensors.tails, strict=True)):
        assert torch.equal(k_GCD[:, tail], tensors.k_RGD[row])
        assert torch.equal(v_GCD[:, tail], tensors.v_RGD[row])
    rule = Rule(scale=0.2, window=case.window, softcap=case.softcap)
    runs = triton_rows.attend_runs(
        tensors.q_RHD,
        case.G,
        tables=filled,
        layer=1,
        rule=rule,
        tile_rows=tile_rows,
        fp8=case.fp8,
    )
    out, lse = runs.merged()
    right = expected(tensors, 0.2)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-3
    assert (out.double() - right.out_BQHD).norm() <= tolerance * right.out_BQHD.norm()
    torch.testing.assert_close(lse.double(), right.lse_BQH, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 8, 300])
def test_items_cover_each_context_for_each_row(kv_heads: int) -> None:
    shards = [(1, 131072), (40, 5000), (1, 1), (3, 257), (2, 0)]
    items, row_items = row_tables.work(shards, tile_rows=16, kv_heads=kv_heads)
    rows = sum(rows for rows, _ in shards)
    assert len(row_items) == rows
    assert len(items) <= row_tables.most_items(rows, kv_heads)
    lengths = [shards[number][1] / runs for number, _, runs, _, _ in items]
    longest, total = math.ceil(max(lengths)), sum(lengths)
    assert longest <= max(32, total / row_tables.runs_wanted(kv_heads) + 1)
    row = 0
    for number, (shard_rows, tokens) in enumerate(shards):
        for _ in range(shard_rows):
            first, runs, place = row_items[row]
            assert (runs == 0) == (tokens == 0)
            for index, item in enumerate(items[first : first + runs]):
                assert item[:3] == [number, index, runs]
                assert item[3] + place == row < item[3] + item[4]
            row += 1
