"""What ranks compute together: merges, sums and gathers, and how they are counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from star_attention.attention.state import State, merge
from star_attention.distributed import SoloComm, TorchComm
from star_attention.planning import traffic
from star_attention.planning.traffic import Traffic
from tests.dist.pool import Pool

B, Q, H, D = 2, 3, 6, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def state_of(rank: int, queries: int = Q) -> State:
    """Return a rank's state; in the first row no rank has keys, in the second rank 0 has none."""
    random = torch.Generator().manual_seed(rank)
    out_BQHD = torch.randn(B, queries, H, D, generator=random)
    lse_BQH = 8 * torch.randn(B, queries, H, generator=random)
    lse_BQH[0, 0] = float("-inf")
    if rank == 0:
        lse_BQH[0, 1] = float("-inf")
    out_BQHD[lse_BQH.isinf()] = 0.0
    return State(out_BQHD, lse_BQH)


def tensor_of(rank: int, dtype: torch.dtype, elements: int = 7) -> Tensor:
    return torch.randn(2, elements, generator=torch.Generator().manual_seed(rank)).to(dtype)


def heads_of(rank: int, dtype: torch.dtype, queries: int = Q) -> list[Tensor]:
    """Return a rank's queries, keys and values: as many heads of each on every rank."""
    random = torch.Generator().manual_seed(rank)
    sizes = ((4, 8), (2, 8), (2, 5))
    return [torch.randn(B, queries, *size, generator=random).to(dtype) for size in sizes]


def gather_heads(comm: TorchComm, queries: int) -> list[tuple[list[Tensor], Traffic]]:
    results = []
    with comm.collective("a test"):
        for dtype in DTYPES:
            before = copy.copy(comm.cp_traffic)
            # As a layer has them: heads before tokens.
            own = [t.transpose(1, 2).contiguous() for t in heads_of(comm.rank, dtype, queries)]
            heads = comm.gather_heads(*(t.transpose(1, 2) for t in own))
            results.append((heads, comm.cp_traffic.since(before)))
    return results


def check_heads(results: list[list[tuple[list[Tensor], Traffic]]], queries: int) -> None:
    for result in results:
        for dtype, (heads, wire) in zip(DTYPES, result, strict=True):
            parts = [heads_of(rank, dtype, queries) for rank in range(len(results))]
            for all_heads, own in zip(heads, zip(*parts, strict=True), strict=True):
                assert torch.equal(all_heads, torch.cat(own, 2))
            part = sum(t.numel() * t.element_size() for t in parts[0])
            assert wire == Traffic(1, traffic.gather_bytes(part, len(results)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_gather_heads(pool: Pool, ranks: int) -> None:
    for queries in (1, 20):
        check_heads(pool.run(gather_heads, ranks, queries=queries), queries)


def merge_on_ranks(comm: TorchComm, queries: int) -> tuple[State, State, Traffic]:
    """Return the merge of all heads and of this rank's two heads, and the traffic of the first."""
    with comm.collective("a test"):
        before = copy.copy(comm.cp_traffic)
        whole = comm.merge(state_of(comm.rank, queries))
        wire = comm.cp_traffic.since(before)
        own = comm.merge(state_of(comm.rank, queries), slice(2 * comm.rank, 2 * comm.rank + 2))
        narrow = comm.merge(state_of(comm.rank, queries), dtype=torch.float16)
        assert torch.equal(narrow.out_BQHD, whole.out_BQHD.half())
    return whole, own, wire


@pytest.mark.parametrize("collective", ["gather", "reduce"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_merge_all_heads_or_some(pool: Pool, ranks: int, collective: str) -> None:
    results = pool.run(merge_on_ranks, ranks, queries=Q, merge_collective=collective)
    expected = merge([state_of(rank) for rank in range(ranks)])
    for rank, (whole, own, wire) in enumerate(results):
        torch.testing.assert_close(whole, expected)
        for part, all_heads in zip(own, results[0][0], strict=True):
            assert torch.equal(part, all_heads[:, :, 2 * rank : 2 * rank + 2])
        assert torch.equal(whole.out_BQHD, results[0][0].out_BQHD)
        assert wire == traffic.merge_traffic(ranks, B * Q * H, D, collective)


def add_and_gather(comm: TorchComm, elements: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with comm.collective("a test"):
        for dtype in DTYPES:
            tensor = tensor_of(comm.rank, dtype, elements)
            before = copy.copy(comm.cp_traffic)
            results[str(dtype)] = comm.cp_sum(tensor), comm.cp_traffic.since(before)
            assert torch.equal(tensor, tensor_of(comm.rank, dtype, elements)), "not in place"
        results["gathered"] = comm.cp_gather(tensor_of(comm.rank, torch.float16)[:, ::2])
        packet = torch.arange(5) + 100 * comm.rank
        comm.broadcast_step(packet).wait()
        results["packet"] = packet
    return results


@pytest.mark.parametrize("elements", [7, 100_000])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_add_gather_and_broadcast(pool: Pool, ranks: int, elements: int) -> None:
    results = pool.run(add_and_gather, ranks, elements=elements)
    for dtype in DTYPES:
        parts = [tensor_of(rank, dtype, elements).double() for rank in range(ranks)]
        expected = torch.stack(parts).sum(0)
        for result in results:
            total, wire = result[str(dtype)]
            assert total.dtype == dtype
            # fp32 sums, rounded once.
            margin = torch.finfo(dtype).eps * expected.abs() + 1e-6
            assert ((total.double() - expected).abs() <= margin).all()
            assert torch.equal(total, results[0][str(dtype)][0])
            assert wire == traffic.sum_traffic(ranks, 2 * elements, dtype.itemsize)
    gathered = torch.stack([tensor_of(rank, torch.float16)[:, ::2] for rank in range(ranks)])
    for result in results:
        assert torch.equal(result["gathered"], gathered)
        assert result["packet"].tolist() == [0, 1, 2, 3, 4]


def rehearse(comm: TorchComm) -> list[Any]:
    """Run collectives that no other rank joins, then count those of a block three times."""
    mesh = comm.on(torch.device("cpu"), tp_size=2)
    with comm.collective("a test"):
        before = mesh.cp_traffic, mesh.tp_traffic
        if comm.rank == 0:
            with mesh.rehearsal():
                shapes = run_all(mesh)
            assert (mesh.cp_traffic, mesh.tp_traffic) == before
        else:
            shapes = []
        assert mesh.cp_traffic == mesh.tp_traffic == Traffic()
        issued = comm.world.watchdog.issued
        with mesh.recording() as recording:
            assert run_all(mesh) == (shapes or run_all_shapes())
        assert mesh.cp_traffic == mesh.tp_traffic == Traffic()
        assert comm.world.watchdog.issued == issued
        run_all(mesh)
        once = mesh.cp_traffic, mesh.tp_traffic, comm.world.watchdog.issued - issued
        once = copy.deepcopy(once)
        recording.replayed()
        recording.replayed()
        thrice = mesh.cp_traffic, mesh.tp_traffic, comm.world.watchdog.issued - issued
    return [
        (once[0].calls, once[0].bytes, once[1].calls, once[1].bytes, once[2]),
        (thrice[0].calls, thrice[0].bytes, thrice[1].calls, thrice[1].bytes, thrice[2]),
    ]


def run_all(comm: Any) -> list[tuple[int, ...]]:
    state = comm.merge(state_of(comm.rank), slice(1, 3))
    comm.broadcast_step(torch.zeros(3)).wait()
    comm.broadcast(torch.zeros(4), comm.cp_size).wait()
    tensor = tensor_of(comm.rank, torch.bfloat16)
    tensors = [*state, comm.cp_sum(tensor), comm.tp_sum(tensor), comm.cp_gather(tensor)]
    return [tuple(tensor.shape) for tensor in (*tensors, *comm.tp_gather(tensor))]


def run_all_shapes() -> list[tuple[int, ...]]:
    return [(B, Q, 2, D), (B, Q, 2), (2, 7), (2, 7), (2, 2, 7), (2, 7), (2, 7)]


def test_a_rehearsal_needs_no_other_rank_and_replays_are_counted(pool: Pool) -> None:
    for once, thrice in pool.run(rehearse, 4):
        assert min(once) > 0
        assert thrice == tuple(3 * count for count in once)


def test_one_process_has_the_same_interface() -> None:
    comm = SoloComm()
    state, tensor = state_of(1), tensor_of(1, torch.float16)
    assert comm.merge(state) is state
    part = comm.merge(state, slice(1, 4))
    assert torch.equal(part.out_BQHD, state.out_BQHD[:, :, 1:4])
    assert torch.equal(part.lse_BQH, state.lse_BQH[:, :, 1:4])
    with comm.rehearsal(), comm.recording() as recording:
        assert torch.equal(comm.cp_sum(tensor), tensor)
        assert torch.equal(comm.cp_gather(tensor), tensor[None])
        comm.broadcast_step(tensor).wait()
    recording.replayed()
    assert comm.cp_traffic == Traffic()
    assert comm.transport_version == 0
