"""CUDA graphs of contexts in host memory: layers arrive between the parts of a forward.

As in `test_graphs`, a stand-in for a graph runs the captured work at each replay.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.attention.kernels import row_tables
from star_attention.hf.cache.arrivals import arrives
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution import graphs
from star_attention.hf.execution.rows import RowForwards
from star_attention.storage import tail
from star_attention.storage.host import feed as feed_module
from star_attention.storage.host.feed import Feed
from tests.decode_rows import Row, prefilled, step
from tests.engines import engine, ids
from tests.recorders import few_runs, with_graphs
from tests.timelines import Now

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_rows  # noqa: E402

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)
FEW: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True, return_logits=True)
TWO = FEW | dict(max_new_tokens=2)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, since the interpreter takes a millisecond for each; two buffers."""
    few_runs(monkeypatch)
    monkeypatch.setattr(graphs, "BUCKETS", (1, 4, 8))
    monkeypatch.setattr(tail, "_INITIAL_CAPACITY", 6)
    monkeypatch.setattr(feed_module, "BUFFERS", 2)


def fed(context: EncodedContext) -> Feed:
    """Let a context's layers arrive as they do on a GPU."""
    layers = [layer for layer in context.kv.layers if layer.on_host and not layer.is_empty]
    return Feed(layers, torch.device("cpu"), copies=Now(), reader=Now)


def check(replies: Sequence[Any]) -> None:
    expected, reply = replies
    assert reply.token_ids == expected.token_ids
    torch.testing.assert_close(reply.logits, expected.logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", dict(kv_resident=0.5)),
        ("gemma2", dict(kv_dtype="fp8")),
        pytest.param("gemma3n", {}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {}, marks=pytest.mark.slow),
    ],
)
def test_layers_that_arrive_answer_as_those_in_place(name: str, settings: dict[str, Any]) -> None:
    plain, far = (engine(name, **SIZES, kv_device="cpu", **settings) for _ in range(2))
    counting = with_graphs(far)
    context = far.encode(ids(101))
    feed = fed(context)
    check([star.generate(own, ids(7, seed=2), **FEW) for star, own in pairs(plain, far, context)])
    arriving = sum(arrives(layer) for layer in context.kv.layers)
    assert arriving == sum(layer.on_host for layer in context.kv.layers if not layer.is_empty)
    assert counting.recorder.replays == 4
    assert counting.recorder.interludes >= 4 * arriving
    del feed


def pairs(
    plain: StarLLM, far: StarLLM, context: EncodedContext
) -> list[tuple[StarLLM, EncodedContext]]:
    """Return an engine without graphs with a context of its own, and one with the context."""
    return [(plain, plain.encode(ids(len(context.token_ids)))), (far, context)]


def test_contexts_there_and_here_take_turns() -> None:
    """Graphs of one do not serve the other; those of one context serve the next, and nobody keeps
    a context that has gone."""
    plain, far = engine("llama", **SIZES), engine("llama", **SIZES, kv_device="cpu")
    counting = with_graphs(far)
    here, first, second = (
        star.encode(ids(101, seed=seed)) for star, seed in ((plain, 0), (far, 0), (far, 5))
    )
    feeds = [fed(first), fed(second)]
    for _ in range(2):
        replies = [far.generate(context, ids(3), **TWO) for context in (here, first)]
        check(replies)
    assert counting.recorder.captures == 4
    expected = plain.generate(plain.encode(ids(101, seed=5)), ids(3), **TWO)
    check([expected, far.generate(second, ids(3), **TWO)])
    assert counting.recorder.captures == 4
    # A forward without a graph in between leaves layers at other places.
    long = ids(12, seed=3)
    check([far.generate(context, long, **TWO) for context in (here, first)])
    del feeds


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_rows_of_contexts_that_arrive(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each context arrives in buffers of its own; rows come and go, and eager steps between."""
    monkeypatch.setattr(row_tables, "PROGRAMS", 2)
    monkeypatch.setattr(row_tables, "SHORTEST_RUN", 40)
    monkeypatch.setattr(triton_rows, "TAIL_RUNS", 1)
    star = engine("llama", **SIZES, kv_device="cpu", kv_resident=share)
    contexts = [star.encode(ids(70)), star.encode(ids(45, seed=2))]
    first, second = (
        prefilled(star, context, ids(4, seed=seed)) for seed, context in enumerate(contexts)
    )
    feeds = [fed(context) for context in contexts]
    arriving = sum(arrives(layer) for layer in contexts[0].kv.layers)
    forwards = RowForwards(star.runtime.handle, star.runtime.comm)
    counting = with_graphs(star)
    both = RowSet([first[0].kv, second[0].kv])

    def check_step(number: int, row_set: RowSet, *rows: Row) -> None:
        logits_RV = step(forwards, list(rows), number, row_set)
        expected_RV = torch.stack([row.logits_SV[number + 1] for row in rows])
        torch.testing.assert_close(logits_RV, expected_RV, atol=2e-4, rtol=1e-4)

    check_step(0, both, *first, *second)
    star.runtime.handle.__dict__["graphs"] = None
    check_step(1, both, *first, *second)
    star.runtime.handle.__dict__["graphs"] = counting
    check_step(2, RowSet([second[0].kv]), *second)
    check_step(2, RowSet([first[0].kv]), *first)
    assert (counting.recorder.captures, counting.recorder.replays) == (2, 3)
    assert counting.recorder.interludes == 4 * arriving
    del feeds


def test_tables_keep_no_context() -> None:
    star = engine("llama", **SIZES, kv_device="cpu")
    with_graphs(star)
    context = star.encode(ids(70))
    feed = fed(context)
    star.generate(context, ids(3), **FEW)
    gone = [weakref.ref(context.kv.layers[0]), weakref.ref(feed)]
    del context, feed
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
