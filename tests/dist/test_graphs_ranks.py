"""CUDA graphs on ranks, without a GPU: all but the capture (see tests/unit/test_graphs.py).

tests/gpu/test_graphs_ranks_cuda.py tests real graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.hf.execution import graphs
from star_attention.hf.execution.capture import Recorder
from star_attention.storage import tail
from star_attention.storage.kv import ContextKV
from tests.dist.pool import Pool
from tests.dist.tp_models import on_disk, star_of
from tests.engines import ids, tiny

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_answer, triton_latent  # noqa: E402

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)


class GraphsOfGloo(graphs.Graphs):
    """Graphs that serve ranks over gloo, which would be refused."""

    def serve(self, shard: ContextKV, comm: Any) -> bool:
        return super().serve(shard, SoloComm())


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


def answers(star: StarLLM, kind: type[Recorder] | None) -> dict[str, Any]:
    """Answer by graphs of that recorder; None for plain forwards."""
    before = (
        *(triton_answer.SPLITS, triton_answer.TAIL_SPLITS, graphs.BUCKETS, tail._INITIAL_CAPACITY),
        *(triton_latent.SPLITS, triton_latent.TAIL_SPLITS),
    )
    # Few programs, since the interpreter takes a millisecond for each.
    triton_answer.SPLITS, triton_answer.TAIL_SPLITS = 2, 1
    graphs.BUCKETS, tail._INITIAL_CAPACITY = (1, 4), 5
    triton_latent.SPLITS, triton_latent.TAIL_SPLITS = 2, 1
    handle = star.runtime.handle
    made = None if kind is None else GraphsOfGloo(handle, kind(handle))
    star.runtime.handle.__dict__["graphs"] = made
    try:
        context = star.encode(ids(101))
        length: dict[str, Any] = dict(max_new_tokens=3, ignore_eos=True)
        first = star.generate(context, ids(4), return_logits=True, **length)
        both = star.generate(context, [ids(3), ids(2, seed=4)], **length)
    finally:
        star.runtime.handle.__dict__.pop("graphs")
        triton_answer.SPLITS, triton_answer.TAIL_SPLITS = before[:2]
        graphs.BUCKETS, tail._INITIAL_CAPACITY = before[2:4]
        triton_latent.SPLITS, triton_latent.TAIL_SPLITS = before[4:]
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
        (2, "gemma3", [RunAgain], {}),
        (2, "llama", [RunAgain, None], {}),
        (2, "llama", [NeverCaptures, RunAgain], {}),
        (2, "deepseek_v3", [RunAgain, None], {}),
        # The last rank, which holds the tail, has no part of the context.
        (3, "llama", [RunAgain], dict(block_size=64, anchor_size=64)),
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
