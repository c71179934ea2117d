"""CUDA graphs on ranks, without a GPU: all but the capture (see tests/unit/test_graphs.py).

tests/gpu/test_graphs_ranks_cuda.py tests real graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution import graphs, row_graphs
from star_attention.hf.execution.capture import Recorder
from star_attention.storage import tail
from tests.dist.pool import Pool
from tests.dist.tp_models import on_disk, star_of
from tests.engines import ids, tiny
from tests.recorders import few_runs

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import (  # noqa: E402
    row_tables,
    triton_rows,
)

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)


class GraphsOfGloo(graphs.Graphs):
    """Graphs that serve ranks over gloo, which would be refused."""

    def runs_on(self, comm: Any) -> bool:
        return True


class RunAgain(Recorder):
    """Runs the work of a forward again at each replay."""

    is_first = True

    def record(
        self, work: Callable[[], None], *, warm_up: Callable[[], Any], comm: Any
    ) -> Callable[[], None]:
        if self.is_first:
            with comm.rehearsal():
                warm_up()
        self.is_first = False
        return work


class NeverCaptures(Recorder):
    def record(self, work: Any, *, warm_up: Any, comm: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


@contextlib.contextmanager
def few_programs() -> Iterator[pytest.MonkeyPatch]:
    """Few programs, since the interpreter takes a millisecond for each; tails that move."""
    with pytest.MonkeyPatch.context() as patched:
        few_runs(patched)
        patched.setattr(graphs, "BUCKETS", (1, 4))
        patched.setattr(tail, "_INITIAL_CAPACITY", 1)
        yield patched


def answers(star: StarLLM, kind: type[Recorder] | None) -> dict[str, Any]:
    """Answer by graphs of that recorder; None for plain forwards."""
    handle = star.runtime.handle
    made = None if kind is None else GraphsOfGloo(handle, kind(handle))
    with few_programs() as patched:
        patched.setitem(star.runtime.handle.__dict__, "graphs", made)
        context = star.encode(ids(101))
        length: dict[str, Any] = dict(max_new_tokens=2, ignore_eos=True)
        first = star.generate(context, ids(4), return_logits=True, **length)
        both = star.generate(context, [ids(3), ids(2, seed=4)], **length)
    return dict(
        tokens=[first.token_ids, *(reply.token_ids for reply in both)],
        logits=first.logits,
        captured=None if made is None else made.captured,
        wire=first.wire,
    )


def answer_by_graphs(
    comm: TorchComm, name: str, kinds: list[type[graphs.Graphs] | None], **settings: Any
) -> dict[str, Any]:
    star = StarLLM(tiny(name), comm=comm, **(SIZES | settings))
    return answers(star, kinds[comm.rank % len(kinds)])


def answer_sharded(comm: Any, path: Path, kind: Any, tensor_parallel: int) -> dict[str, Any]:
    return answers(star_of(comm, path, tensor_parallel), kind)


def check(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        assert result["tokens"] == expected["tokens"]
    torch.testing.assert_close(results[0]["logits"], expected["logits"], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "name", "kinds", "settings"),
    [
        # Windows; a rank that has no graphs; one whose capture fails; compressed keys.
        pytest.param(2, "gemma3", [RunAgain], {}, marks=pytest.mark.slow),
        pytest.param(2, "llama", [RunAgain, None], {}, marks=pytest.mark.slow),
        (2, "llama", [NeverCaptures, RunAgain], {}),
        (2, "deepseek_v3", [RunAgain, None], {}),
        # The last rank, which holds the tail, has no part of the context.
        (3, "llama", [RunAgain], dict(block_size=64, anchor_size=64)),
        # Windows with softcap, and the ring.
        (2, "gemma2", [RunAgain], dict(method="ring", block_size=None, anchor_size=None)),
    ],
)
def test_graphs_on_ranks(
    pool: Pool, ranks: int, name: str, kinds: list[Any], settings: dict[str, Any]
) -> None:
    """Ranks with graphs answer beside ranks without, as one rank does."""
    results = pool.run(answer_by_graphs, ranks, name=name, kinds=kinds, **settings)
    alone = settings | (dict(method="dense") if "method" in settings else {})
    check(results, answer_by_graphs(SoloComm(), name, [None], **alone))
    for rank, result in enumerate(results):
        kind = kinds[rank % len(kinds)]
        keys = {(rows, tokens, False, rank == 0, ()) for rows in (1, 2) for tokens in (1, 4)}
        expected = {key: kind is RunAgain for key in keys}
        assert result["captured"] == (None if kind is None else expected)


def test_graphs_on_a_mesh(pool: Pool, models: Path) -> None:
    path = on_disk(models, "qwen3")
    results = pool.run(answer_sharded, 4, path=path, kind=RunAgain, tensor_parallel=2)
    check(results, answer_sharded(SoloComm(), path, None, 1))
    assert all(result["captured"] for result in results)


# ----------------------------------------------------------------------------------- rows


def answer_rows(
    comm: TorchComm, name: str, kinds: list[type[Recorder] | None], **settings: Any
) -> dict[str, Any]:
    """Answer in a batch whose rows come and go, by graphs of each rank's kind of recorder."""
    star = StarLLM(tiny(name), comm=comm, **(SIZES | settings))
    kind, handle = kinds[comm.rank % len(kinds)], star.runtime.handle
    made = None if kind is None else GraphsOfGloo(handle, kind(handle))
    handle.__dict__["graphs"] = made
    tokens: list[list[int]] = []
    runs: list[RowSet] = []

    def run(graphs: Any, rows: RowSet, *arguments: Any) -> Any:
        runs.append(rows)
        return run_rows(graphs, rows, *arguments)

    run_rows = row_graphs.RowGraphs.run
    with few_programs() as patched:
        patched.setattr(row_tables, "PROGRAMS", 2)
        patched.setattr(row_tables, "SHORTEST_RUN", 40)
        patched.setattr(triton_rows, "TAIL_RUNS", 1)
        patched.setattr(row_graphs, "BUCKETS", (2,))
        patched.setattr(row_graphs.RowGraphs, "run", run)
        if comm.rank:
            star.follow()
        else:
            tokens = _tokens_of_rows(star)
            star.close()
    return dict(tokens=tokens, runs=len(runs))


def _tokens_of_rows(star: StarLLM) -> list[list[int]]:
    contexts = [star.encode(ids(101)), star.encode(ids(40, seed=2))]
    with star.batch(max_rows=2) as batch:
        rows = [
            batch.add(contexts[number % 2], ids(4, seed=number), max_new_tokens=length)
            for number, length in enumerate((3, 2, 2))
        ]
        return [row.result().token_ids for row in rows]


@pytest.mark.parametrize(
    ("ranks", "name", "kinds", "settings"),
    [
        (2, "llama", [RunAgain], {}),
        pytest.param(2, "qwen3", [RunAgain], dict(slice_weights=True), marks=pytest.mark.slow),
        # The last rank, which holds the tails, has no part of a context.
        pytest.param(
            3, "llama", [RunAgain], dict(block_size=64, anchor_size=64), marks=pytest.mark.slow
        ),
        # One rank has no graphs, or windows are not known in parts of contexts: none runs any.
        pytest.param(2, "llama", [RunAgain, None], {}, marks=pytest.mark.slow),
        pytest.param(2, "llama", [NeverCaptures, RunAgain], {}, marks=pytest.mark.slow),
        pytest.param(2, "gemma3", [RunAgain], {}, marks=pytest.mark.slow),
    ],
)
def test_graphs_of_rows_on_ranks(
    pool: Pool, ranks: int, name: str, kinds: list[Any], settings: dict[str, Any]
) -> None:
    results = pool.run(answer_rows, ranks, name=name, kinds=kinds, **settings)
    alone = {key: value for key, value in settings.items() if key != "slice_weights"}
    assert results[0]["tokens"] == answer_rows(SoloComm(), name, [None], **alone)["tokens"]
    runs = [result["runs"] for result in results]
    if kinds == [RunAgain] and name != "gemma3":
        assert min(runs) == max(runs) > 1
    else:
        assert max(runs) == 0
