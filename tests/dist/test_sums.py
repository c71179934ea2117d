"""Sums over ranks inside compiled code, where a collective is one operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from star_attention.distributed import TorchComm
from star_attention.hf.cache.base import ForwardPosition, StarCache
from star_attention.hf.execution import hook, sums
from tests.dist.pool import Pool
from tests.engines import tiny

LAYERS = 3


class Gate(nn.Module):
    """A row-parallel layer, and what a residual stream does with its result."""

    def __init__(self, seed: int, comm: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.down = nn.Linear(6, 5)
        if comm is not None:
            columns = slice(3 * comm.tp_rank, 3 * comm.tp_rank + 3)
            self.down.weight = nn.Parameter(self.down.weight[:, columns].clone())
            self.down.bias = self.down.bias if comm.tp_rank == 0 else None
            self.down.register_forward_hook(sums.summing(comm))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x).relu() + 1


def compiled_rows(comm: TorchComm) -> Any:
    """Run row-parallel layers as they are and compiled; return also how often they compiled."""
    mesh = comm.on(torch.device("cpu"), 2)
    torch._dynamo.reset()
    counters.clear()
    outs = []
    x = torch.arange(12.0).reshape(2, 6) / 10
    part = x[:, 3 * mesh.tp_rank : 3 * mesh.tp_rank + 3]
    for seed in range(LAYERS):
        layer = Gate(seed, mesh)
        compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True, dynamic=False)
        with torch.no_grad(), comm.collective("a test"):
            outs.append((layer(part).tolist(), compiled(part).tolist()))
    return outs, counters["stats"]["unique_graphs"], mesh.tp_traffic.calls


@pytest.mark.parametrize("ranks", [2, 4])
def test_row_parallel_layers_are_compiled_with_their_sum(pool: Pool, ranks: int) -> None:
    """Once for all layers of a kind, outside of our forwards too."""
    x = torch.arange(12.0).reshape(2, 6) / 10
    for outs, graphs, calls in pool.run(compiled_rows, ranks):
        for seed, (eager, compiled) in enumerate(outs):
            expected = Gate(seed)(x)
            torch.testing.assert_close(torch.tensor(eager), expected)
            torch.testing.assert_close(torch.tensor(compiled), expected)
        assert (graphs, calls) == (1, 2 * LAYERS)


def sum_in_forward(comm: TorchComm, kind: Any, tensor_parallel: int, compile: bool) -> Any:
    mesh = comm.on(torch.device("cpu"), tensor_parallel)
    part = torch.full((2, 3), 10.0**comm.rank)

    def step(part: Tensor) -> tuple[Tensor, Tensor]:
        doubled = part * 2
        return doubled + sums.sum_over(doubled, kind), doubled

    if compile:
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    cache = StarCache([], ForwardPosition(), mesh)
    with (
        torch.no_grad(),
        comm.collective("a test"),
        hook.running(tiny("llama"), [], [], cache, None),
    ):
        total, doubled = step(part)
    return (total - 2 * part).tolist()[1], doubled.tolist() == (2 * part).tolist()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("kind", "ranks", "tensor_parallel", "totals"),
    [
        ("cp", 3, 1, [222, 222, 222]),
        ("tp", 2, 2, [22, 22]),
        ("cp", 4, 2, [202, 2020, 202, 2020]),
        ("tp", 4, 2, [22, 22, 2200, 2200]),
    ],
)
def test_sums_over_the_ranks_of_a_forward(
    pool: Pool,
    kind: str,
    ranks: int,
    tensor_parallel: int,
    totals: list[int],
    compile: bool,
) -> None:
    """A summand that is used again keeps its value."""
    results = pool.run(
        sum_in_forward, ranks, kind=kind, tensor_parallel=tensor_parallel, compile=compile
    )
    assert results == [([float(total)] * 3, True) for total in totals]
