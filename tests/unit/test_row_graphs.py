"""The logic of rows' CUDA graphs: everything but the capture, which needs a GPU.

A stand-in for a graph runs the captured work at each replay, and kernels run in Triton's
interpreter. tests/gpu/test_rows_cuda.py tests real graphs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.attention.kernels import row_tables
from star_attention.generation.batching import warming
from star_attention.hf.cache import row_graph
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution import row_graphs
from star_attention.hf.execution.rows import RowForwards
from star_attention.storage import tail
from star_attention.storage.tail import Tail
from tests.decode_rows import Row, prefilled, step
from tests.engines import engine, ids
from tests.recorders import CountingGraphs, few_runs, refuse, with_graphs

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_rows  # noqa: E402

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, since the interpreter takes a millisecond for each; tails that move."""
    monkeypatch.setattr(row_tables, "PROGRAMS", 2)
    monkeypatch.setattr(row_tables, "SHORTEST_RUN", 40)
    monkeypatch.setattr(triton_rows, "TAIL_RUNS", 1)
    few_runs(monkeypatch)
    monkeypatch.setattr(row_graph, "_ROOM", 2)
    monkeypatch.setattr(tail, "_INITIAL_CAPACITY", 6)


def rows_of_two_contexts(star: StarLLM, steps: int = 3) -> list[Row]:
    first, second = star.encode(ids(70)), star.encode(ids(45, seed=2))
    return [
        *prefilled(star, first, ids(4, seed=3), ids(5, seed=4), steps=steps),
        *prefilled(star, second, ids(9, seed=5), steps=steps),
    ]


def check(forwards: RowForwards, rows: list[Row], number: int, row_set: RowSet) -> None:
    """Run a step, and compare its logits with those of the rows alone."""
    logits_RV = step(forwards, rows, number, row_set)
    expected_RV = torch.stack([row.logits_SV[number + 1] for row in rows])
    torch.testing.assert_close(logits_RV, expected_RV, atol=2e-4, rtol=1e-4)


def served(star: StarLLM) -> tuple[RowForwards, CountingGraphs]:
    return RowForwards(star.runtime.handle, star.runtime.comm), with_graphs(star)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama", "qwen3", "gemma2", "gemma3", "gemma3n", "mistral")
        ),
    ],
)
def test_rows_come_and_go(name: str) -> None:
    """Windows, softcap, sinks, shared keys: logits are those of each row alone."""
    star = engine(name, **SIZES)
    rows = rows_of_two_contexts(star)
    forwards, counting = served(star)
    check(forwards, rows[:2], 0, RowSet([row.kv for row in rows[:2]]))
    # One leaves, another joins, which is a step behind.
    both = [rows[0], rows[2]]
    logits_RV = forwards.run(
        RowSet([row.kv for row in both]),
        torch.tensor([both[0].token_ids[1], both[1].token_ids[0]]),
        None,
    )
    expected_RV = torch.stack([both[0].logits_SV[2], both[1].logits_SV[1]])
    torch.testing.assert_close(logits_RV, expected_RV, atol=2e-4, rtol=1e-4)
    check(forwards, rows[2:], 1, RowSet([rows[2].kv]))
    assert counting.recorder.replays == 3
    assert {key[0] for key in counting.of_rows.captured} == {1, 2}
    assert [row.kv.tail_tokens for row in rows] == [4 + 2, 5 + 1, 9 + 2]


def test_a_bucket_serves_fewer_rows_and_another_membership(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_graphs, "BUCKETS", (2,))
    star = engine("llama", **SIZES)
    rows = rows_of_two_contexts(star)[1:]
    forwards, counting = served(star)
    check(forwards, rows[:1], 0, RowSet([rows[0].kv]))
    check(forwards, rows[1:], 0, RowSet([rows[1].kv]))
    check(forwards, rows[::-1], 1, RowSet([rows[1].kv, rows[0].kv]))
    assert (counting.recorder.captures, counting.recorder.replays) == (1, 3)


@pytest.mark.slow
def test_contexts_in_fp8_have_graphs_of_their_own() -> None:
    star = engine("llama", kv_dtype="fp8", **SIZES)
    rows = rows_of_two_contexts(star)[1:]
    forwards, counting = served(star)
    check(forwards, rows, 0, RowSet([row.kv for row in rows]))
    ((_rows, _tile_rows, fp8),) = counting.of_rows.captured
    assert fp8


def test_plain_forwards_in_between() -> None:
    """The tables are filled again after steps that no graph has run."""
    star = engine("llama", **SIZES)
    rows = rows_of_two_contexts(star)[:1]
    forwards, counting = served(star)
    row_set = RowSet([rows[0].kv])
    for number, graphs in enumerate((counting, None, counting)):
        star.runtime.handle.__dict__["graphs"] = graphs
        check(forwards, rows, number, row_set)
    assert counting.recorder.replays == 2


@pytest.mark.parametrize("why", ["no capture", "too many rows", "streaming_llm"])
def test_what_graphs_cannot_serve_runs_without(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(block_size=20, anchor_size=3, method=why) if why == "streaming_llm" else SIZES
    star = engine("llama", **settings)
    rows = rows_of_two_contexts(star)
    forwards, counting = served(star)
    if why == "no capture":
        monkeypatch.setattr(counting.recorder, "record", refuse)
    if why == "too many rows":
        monkeypatch.setattr(row_graphs, "BUCKETS", (1, 2))
    for number in range(2):
        check(forwards, rows, number, RowSet([row.kv for row in rows]))
    assert counting.recorder.replays == 0
    assert set(counting.of_rows.captured.values()) == ({False} if why == "no capture" else set())


def test_tails_of_different_capacities_run_without() -> None:
    """Forbids to write where one layer's tail has room and another's has not."""
    star = engine("llama", **SIZES)
    rows = rows_of_two_contexts(star)[:1]
    forwards, counting = served(star)
    (row,) = rows
    # As after a forward that ran out of memory.
    row.kv.tails[0].start_with(row.kv.tails[0].pair(), room=100)
    check(forwards, rows, 0, RowSet([row.kv]))
    assert counting.recorder.replays == 1
    assert len({tail.capacity(1) for tail in row.kv.tails}) == 1


# -------------------------------------------------------------------------------- queries


@pytest.mark.parametrize(
    "name",
    [
        "mistral",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama", "gpt_oss", "gemma2", "gemma3n")
        ),
    ],
)
def test_a_forward_reads_queries_beside_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that share a tail see those before them: a new query, and one after kept tokens."""
    monkeypatch.setattr(row_graphs, "BUCKETS", (5,))
    star = engine(name, **SIZES)
    query = ids(2, seed=3)
    first, second = prefilled(star, star.encode(ids(70)), query, ids(5, seed=4))
    (third,) = prefilled(star, star.encode(ids(45, seed=2)), ids(9, seed=5))
    new = replace(first.kv, tails=[Tail() for _ in first.kv.tails])
    row_set = RowSet([*new.of_next(2), second.kv, *third.kv.of_next(2)])
    assert row_set.groups == [(0, 3), (3, 5)]
    forwards, counting = served(star)
    tokens = [*query, second.token_ids[0], *third.token_ids[:2]]
    logits_RV = forwards.run_with_queries(row_set, torch.tensor(tokens), [1, 2, 4])
    assert logits_RV is not None
    expected = [first.logits_SV[0], second.logits_SV[1], third.logits_SV[2]]
    torch.testing.assert_close(logits_RV, torch.stack(expected), atol=2e-4, rtol=1e-4)
    assert [row.tail_tokens for row in (new, second.kv, third.kv)] == [2, 5 + 1, 9 + 2]
    for new_tail, right in zip(new.tails, first.kv.tails, strict=True):
        if right.length:
            torch.testing.assert_close(new_tail.pair(), right.pair(), atol=2e-4, rtol=1e-4)
    assert counting.recorder.replays == 1


def test_queries_that_no_graph_serves_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    star = engine("llama", **SIZES)
    rows = rows_of_two_contexts(star)[:1]
    forwards, counting = served(star)
    monkeypatch.setattr(counting.recorder, "record", refuse)
    row_set = RowSet(rows[0].kv.of_next(2))
    tokens = torch.tensor(rows[0].token_ids[:2])
    assert forwards.run_with_queries(row_set, tokens, [1]) is None
    check(forwards, rows, 0, RowSet([rows[0].kv]))
    assert not forwards.by_graph


def test_tiles_are_for_rows_and_the_average_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids tiles as large as a query for contexts that a row or two read."""
    monkeypatch.setattr(row_tables, "tile_rows", lambda shared, *_, **__: shared)
    star = engine("llama", **SIZES)
    first, second, third = (row.kv for row in rows_of_two_contexts(star))
    buffers = row_graph.RowBuffers(
        star.runtime.handle.probe_result, torch.device("cpu"), is_part=False
    )
    assert buffers.tile_rows(RowSet([first, second, third])) == 2
    assert buffers.tile_rows(RowSet(first.of_next(40))) == 40
    # 40 rows for 70 keys, and 1 for 45.
    assert buffers.tile_rows(RowSet([*first.of_next(40), third])) == 25
    assert buffers.tile_rows(RowSet([first, second, *third.of_next(2)])) == 2


def test_a_query_gets_room_for_all_of_its_tokens_at_once() -> None:
    star = engine("gemma3n", **SIZES)
    row = rows_of_two_contexts(star)[0].kv
    new = replace(row, tails=[Tail() for _ in row.tails])
    buffers = row_graph.RowBuffers(
        star.runtime.handle.probe_result, torch.device("cpu"), is_part=False
    )
    for begun, tokens in ((new, 20), (row, 4 + 20)):
        version = begun.tails[0].version
        buffers.reserve(RowSet(begun.of_next(20)))
        # Keys and values have moved once each.
        assert begun.tails[0].version == version + 2
        stored = [tail for tail, own in zip(begun.tails, row.tails, strict=True) if own.length]
        assert min(tail.capacity(1) for tail in stored) >= tokens


@pytest.mark.slow
def test_rows_of_a_batch_join_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """From `batch.add` to the kernel, answers are those alone."""
    monkeypatch.setattr(row_graphs, "BUCKETS", (2, 5))
    star = engine("llama", **SIZES)
    contexts = [star.encode(ids(70)), star.encode(ids(45, seed=2))]
    jobs = [(contexts[0], ids(4)), (contexts[1], ids(2, seed=2)), (contexts[0], ids(2, seed=3))]
    settings: dict[str, Any] = dict(max_new_tokens=3, ignore_eos=True)
    expected = [star.generate(*job, **settings).token_ids for job in jobs]
    counting = with_graphs(star)
    with star.batch() as batch:
        rows = [batch.add(*jobs[0], **settings)]
        batch.step()
        batch.step()
        captured = len(counting.captured)
        rows += [batch.add(*job, **settings) for job in jobs[1:]]
        assert [row.result().token_ids for row in rows] == expected
        assert len(counting.captured) == captured, "no query has a forward of its own"
    assert {key[0] for key in counting.of_rows.captured} == {2, 5}


@pytest.mark.slow
def test_nothing_is_captured_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids answers that wait for a capture, whichever rows come together."""
    monkeypatch.setattr(row_graphs, "BUCKETS", (1, 2, 4))
    monkeypatch.setattr(row_tables, "TILES", (4, 8))
    monkeypatch.setattr(warming, "BUCKETS", (1, 16))
    star = engine("llama", **SIZES)
    counting = with_graphs(star)
    pieces = list(warming.warm_up(star, max_rows=3))
    assert pieces[:2] == ["a context of 64 tokens", "a query of 16 tokens"]
    captures = counting.recorder.captures
    assert captures == len(counting.captured) + len(counting.of_rows.captured)
    first, second = star.encode(ids(70)), star.encode(ids(45, seed=2))
    with star.batch(max_rows=3) as batch:
        for number, context in enumerate((first, second, first)):
            batch.add(context, ids(11, seed=number), max_new_tokens=2 + number, ignore_eos=True)
            batch.step()
        for _ in batch:
            pass
    assert counting.recorder.captures == captures


def test_rows_that_begin_together_have_room() -> None:
    """Forbids copying each row's tails twice, when it leaves its group and for its first token."""
    star = engine("llama", **SIZES)
    graphs = with_graphs(star)
    context = star.encode(ids(40))
    with star.batch() as batch:
        rows = [
            batch.add(context, ids(16, seed=seed), max_new_tokens=5, ignore_eos=True)
            for seed in (1, 2)
        ]
        batch.step()
        tails = [row._task.kv.tails for row in rows if row._task.kv is not None]
        versions = [[tail.version for tail in each] for each in tails]
        for _ in range(3):
            batch.step()
        assert graphs.recorder.replays >= 3
        assert [each[0].length for each in tails] == [19, 19]
        assert [[tail.version for tail in each] for each in tails] == versions
