"""Kernels that write into other ranks' memory, in Triton's interpreter: processes and shared memory
stand for GPUs. `tests/gpu/test_peers_cuda.py` has the same on GPUs.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
from multiprocessing import shared_memory
from typing import Any

import pytest
import torch
from torch import Tensor

from star_attention.attention.runs import Runs
from star_attention.attention.state import State, merge
from star_attention.distributed import TorchComm
from tests.dist.pool import Pool
from tests.dist.row_checks import check_product, check_row, check_sums, sum_rows
from tests.dist.test_collectives import (
    DTYPES,
    H,
    add_and_gather,
    check_heads,
    gather_heads,
    heads_of,
    merge_on_ranks,
    rehearse,
    state_of,
    tensor_of,
)
from tests.new_oracle import new_tokens
from tests.row_norms import PARTS, norms_of
from tests.runs_oracle import even_runs, runs_by_table
from tests.tiers import in_turn

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)


KINDS = ["add", "row", "product", "gather", "heads", "merge", "runs", "new", "broadcast"]


class HostMemory:
    """Memory that processes share, with the methods of `CudaMemory`."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._blocks: dict[int, Any] = {}

    def _add(self, block: Any) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(block.buf))
        self._blocks[address] = block
        return address

    def allocate(self, bytes: int) -> int:
        return self._add(shared_memory.SharedMemory(create=True, size=bytes))

    def export(self, address: int) -> str:
        name: str = self._blocks[address].name
        return name

    def open(self, exported: str) -> int:
        return self._add(shared_memory.SharedMemory(exported))

    def clear(self, address: int, bytes: int) -> None:
        ctypes.memset(address, 0, bytes)

    def synchronize(self) -> None:
        return

    def flag(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int32)

    def unlink(self, address: int) -> None:
        self._blocks[address].unlink()


class NoMemory(HostMemory):
    def open(self, exported: str) -> int:
        raise RuntimeError("peer access is not supported")


def connected(comm: TorchComm, memory: HostMemory) -> Any:
    from star_attention.distributed.peers import PeerGroup

    peers = PeerGroup(comm.rank, comm.size, memory)
    peers.connect(lambda key, text: comm.gather(text))
    return peers


def random_operations(comm: TorchComm, operations: int) -> None:
    """Compare operations of random kinds, sizes and precisions with the plain ones."""
    with comm.collective("a test"):
        memory = HostMemory()
        peers = connected(comm, memory)
        assert peers.usable
        draw, delay = random.Random(0), random.Random(comm.rank)
        for number in range(operations):
            for _ in range(delay.randrange(100)):
                torch.zeros(100).sum()
            kind, dtype = draw.choice(KINDS), draw.choice(DTYPES)
            seeds = [number * comm.size + rank for rank in range(comm.size)]
            elements = draw.choice([1, 7, 500, 1500])
            parts = [tensor_of(seed, dtype, elements) for seed in seeds]
            own = parts[comm.rank].clone()
            if kind == "add":
                # A whole number of words or not, which begin where one does or not.
                taken = draw.choice([slice(None), slice(1, None), slice(1, -1)])
                parts = [part.view(-1)[taken] for part in parts] if elements > 1 else parts
                own = parts[comm.rank]
                total = parts[0].float()
                for part in parts[1:]:
                    total = total + part.float()
                # The interpreter rounds to bfloat16 towards zero.
                rtol = 2**-7 if dtype == torch.bfloat16 else 0.0
                torch.testing.assert_close(peers.add(own), total.to(dtype), rtol=rtol, atol=0.0)
            elif kind == "row":
                check_row(peers, comm, [part.view(1, -1) for part in parts], number)
            elif kind == "product":
                check_product(peers, comm, draw.choice([20, 40, 40, 1030]), number)
            elif kind == "gather":
                assert torch.equal(peers.gather(own), torch.stack(parts)), (number, kind)
            elif kind == "heads":
                queries = draw.choice([1, 3, 20])
                heads = [heads_of(seed, dtype, queries) for seed in seeds]
                gathered = peers.gather_heads(heads[comm.rank])
                for all_heads, of_ranks in zip(gathered, zip(*heads, strict=True), strict=True):
                    assert torch.equal(all_heads, torch.cat(of_ranks, 2)), (number, kind)
            elif kind == "new":
                new = new_tokens(number, comm.size, dtype, draw)
                before = new.copies()
                queries = peers.gather_new(new.own[comm.rank], new.tails, new.rotation)
                new.check(queries, before)
            elif kind == "broadcast":
                packets = [torch.arange(elements) + (seed << 40) for seed in seeds]
                peers.broadcast(packets[comm.rank])
                assert torch.equal(packets[comm.rank], packets[0]), (number, kind)
            elif kind == "runs":
                # Tails are read by one rank alone, and the others have no runs over them.
                make, counts = draw.choice([(even_runs, [1, 70]), (runs_by_table, [0, 3])])
                # Few rows: the interpreter takes milliseconds for each program.
                sizes = dict(B=draw.choice([1, 2]), D=draw.choice([5, 40]))
                sizes["count"] = draw.choice(counts)
                check_runs(peers, comm, [make(seed, **sizes) for seed in seeds])  # type: ignore[operator]
            else:
                check_merge(peers, comm, [state_of(seed) for seed in seeds], draw)
        memory.unlink(peers._own)


def check_merge(peers: Any, comm: TorchComm, states: list[State], draw: random.Random) -> None:
    expected = merge(states)
    heads = [draw.randrange(H) for _ in range(comm.size)]
    first = heads[comm.rank]
    merged = peers.merge(states[comm.rank], slice(first, first + 2))
    for part, whole in zip(merged, expected, strict=True):
        torch.testing.assert_close(part, whole[:, :, first : first + 2])
    # Every rank computes the same bits.
    everything = peers.merge(states[comm.rank])
    narrow = peers.merge(states[comm.rank], dtype=torch.float16)
    assert torch.equal(narrow.out_BQHD, everything.out_BQHD.half())
    assert torch.equal(narrow.lse_BQH, everything.lse_BQH)
    for part, whole in zip(merged, everything, strict=True):
        assert torch.equal(part, whole[:, :, first : first + 2])
    for other in comm.gather(everything):
        assert torch.equal(other.out_BQHD, everything.out_BQHD)
        assert torch.equal(other.lse_BQH, everything.lse_BQH)


def check_runs(peers: Any, comm: TorchComm, parts: list[tuple[Runs, State]]) -> None:
    """All ranks merge runs, or the first one runs and the others states."""
    expected = merge([state for _, state in parts])
    runs, state = parts[comm.rank]
    mixed = peers.merge(state if comm.rank else runs, slice(1, 3))
    for part, whole in zip(mixed, expected, strict=True):
        torch.testing.assert_close(part, whole[:, :, 1:3])
    merged = peers.merge(runs)
    torch.testing.assert_close(merged, expected)
    narrow = peers.merge(runs, slice(comm.rank, comm.rank + 2), dtype=torch.float16)
    assert torch.equal(narrow.out_BQHD, merged.out_BQHD[:, :, comm.rank : comm.rank + 2].half())
    for other in comm.gather(merged):
        assert torch.equal(other.out_BQHD, merged.out_BQHD)
        assert torch.equal(other.lse_BQH, merged.lse_BQH)


@pytest.mark.parametrize("ranks", in_turn(0, [1, 2, 3], quick=lambda ranks: ranks == 2))
def test_operations_in_any_order_equal_the_plain_ones(pool: Pool, ranks: int) -> None:
    pool.run(random_operations, ranks, operations=30)


def abort_and_begin_again(comm: TorchComm) -> list[float]:
    from star_attention.distributed import triton_peers
    from star_attention.linear.triton_few import Product

    with comm.collective("a test"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_peers, "SPINS", 8)
        memory = HostMemory()
        peers = connected(comm, memory)
        part = torch.ones(2000)
        assert torch.equal(peers.add(part), torch.full((2000,), 2.0))
        if comm.rank == 0:
            threading.Timer(0.3, peers.abort).start()
            # The other rank does not come.
            lost = peers.add(part), *peers.merge(even_runs(1)[0]), peers.gather(part)
            lost += tuple(peers.add_row(part, norms_of(part, PARTS[-1])))
            product = Product(torch.ones(200, 8).half(), None, None, torch.empty(1, 200).half())
            norms = norms_of(product.out, PARTS[-1])
            lost += tuple(peers.add_product(torch.ones(1, 8).half(), product, norms))
            heads = peers.gather_heads(heads_of(0, torch.float32))
            new = new_tokens(0, 2, torch.float32, random.Random(0))
            queries = peers.gather_new(new.own[0], new.tails, new.rotation)
            for tensor in (*lost, *heads, queries):
                assert not tensor.isnan().any()
        peers.connect(lambda key, text: comm.gather(text))
        total = peers.add(part)
        memory.unlink(peers._own)
        return total.tolist()


def test_an_abort_ends_a_kernel_that_waits(pool: Pool) -> None:
    for total in pool.run(abort_and_begin_again, 2):
        assert total == [2.0] * 2000


def rehearse_alone(comm: TorchComm) -> None:
    """Run every operation on one rank alone, which must not wait or count, then all together."""
    from star_attention.linear.triton_few import Product

    with comm.collective("a test"):
        memory = HostMemory()
        peers = connected(comm, memory)
        part = tensor_of(comm.rank, torch.float32)
        if comm.rank == 0:
            peers.add(part, rehearsal=True)
            peers.merge(state_of(0), rehearsal=True)
            peers.merge(even_runs(0)[0], rehearsal=True)
            row = part.view(1, -1)
            assert len(peers.add_row(row, norms_of(row, PARTS[-1]), rehearsal=True)) == 2
            half = row.half()
            product = Product(torch.ones(6, row.shape[-1]).half(), None, None, half[:, :6])
            norms = norms_of(product.out, PARTS[-1])
            assert len(peers.add_product(half, product, norms, rehearsal=True)) == 2
            assert peers.gather(part, rehearsal=True).shape == (2, *part.shape)
            own = heads_of(0, torch.float32)
            for heads, t in zip(peers.gather_heads(own, rehearsal=True), own, strict=True):
                assert heads.shape == (*t.shape[:2], 2 * t.shape[2], t.shape[3])
            new = new_tokens(0, 2, torch.float32, random.Random(0))
            before = new.copies()
            assert peers.gather_new(new.own[0], new.tails, rehearsal=True).shape[2] == 12
            for pair, old in zip(new.stored, before, strict=True):
                assert torch.equal(torch.stack(pair), torch.stack(old))
            peers.broadcast(part, rehearsal=True)
            assert torch.equal(part, tensor_of(0, torch.float32))
        total = tensor_of(0, torch.float32) + tensor_of(1, torch.float32)
        assert torch.equal(peers.add(part), total)
        memory.unlink(peers._own)


def test_a_rehearsal_needs_no_other_rank(pool: Pool) -> None:
    pool.run(rehearse_alone, 2)


def through_the_mesh(comm: TorchComm) -> tuple[Any, Any]:
    """Return what collectives of the mesh give through memory and without, with their traffic."""
    plain = merge_on_ranks(comm, 3), add_and_gather(comm, 7)
    check_sums(sum_rows(comm), comm.size)
    memory = HostMemory()
    with comm.collective("a test"):
        peers = connected(comm, memory)
    groups, everyone = comm.world.groups._groups, range(comm.size)
    used = []
    for name in ("add", "add_row", "add_product", "gather", "gather_heads", "merge", "broadcast"):
        operation = getattr(peers, name)

        def spy(*args: Any, name: str = name, operation: Any = operation, **kwargs: Any) -> Any:
            used.append(name)
            return operation(*args, **kwargs)

        setattr(peers, name, spy)
    groups["peers", everyone] = peers
    try:
        fast = merge_on_ranks(comm, 3), add_and_gather(comm, 7), gather_heads(comm, 5)
        assert used == [
            *3 * ["merge"],
            "add",
            "add",
            "add",
            "gather",
            "broadcast",
            *3 * ["gather_heads"],
        ]
        check_sums(sum_rows(comm), comm.size)
        # Products of numbers in fp32 are not sent by the kernel that multiplies.
        assert used[-4:] == ["add_row", "add_row", "add_row", "add_product"]
        if comm.size == 4:
            rehearse(comm)
            assert used[-1] == "broadcast"
    finally:
        del groups["peers", everyone]
        memory.unlink(peers._own)
    return plain, fast


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mesh_uses_memory_for_small_tensors_and_counts_the_same(pool: Pool, ranks: int) -> None:
    results = pool.run(through_the_mesh, ranks)
    check_heads([fast[2] for _, fast in results], 5)
    for plain, fast in results:
        (whole, own, wire), added = plain
        (fast_whole, fast_own, fast_wire), fast_added, _ = fast
        torch.testing.assert_close(fast_whole, whole)
        torch.testing.assert_close(fast_own, own)
        assert fast_wire == wire
        assert fast_added.keys() == added.keys()
        for key, value in added.items():
            if isinstance(value, Tensor):
                assert torch.equal(fast_added[key], value)
                continue
            (total, wire), (fast_total, fast_wire) = value, fast_added[key]
            # The interpreter rounds to bfloat16 towards zero.
            torch.testing.assert_close(fast_total, total, rtol=2**-7, atol=0.0)
            assert fast_wire == wire


def connect_without_access(comm: TorchComm) -> bool:
    with comm.collective("a test"):
        memory = NoMemory() if comm.rank == 1 else HostMemory()
        peers = connected(comm, memory)
        memory.unlink(peers._own)
        usable: bool = peers.usable
        return usable


def test_no_rank_uses_memory_that_one_cannot_open(pool: Pool) -> None:
    assert pool.run(connect_without_access, 2) == [False, False]


def test_sizes_that_fit() -> None:
    from star_attention.distributed.peers import PeerGroup

    peers = PeerGroup(0, 2, HostMemory())
    programs, words = 1024, 512
    assert peers.fits(torch.empty(programs * words, dtype=torch.bfloat16))
    assert not peers.fits(torch.empty(programs * words + 1, dtype=torch.bfloat16))
    assert not peers.fits(torch.empty(programs * words // 2 + 1, dtype=torch.int64))
    assert not peers.fits(torch.empty(0))
    assert peers.fits_states(programs * 4, 128)
    assert not peers.fits_states(programs * 4 + 1, 128)
    assert peers.fits_states(programs * 32, 16)
    assert peers.fits_states(programs // 2, 1024)
    assert not peers.fits_states(programs // 2 + 1, 1024)
