"""Sockets between ranks of one host: what passes through them, and what ends the wait for it."""

from __future__ import annotations

import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from star_attention.distributed import TorchComm, collectives
from star_attention.distributed.groups import SOCKETS
from star_attention.distributed.sockets import Exchange, SocketGroup
from tests.dist.pool import Pool
from tests.dist.test_collectives import DTYPES, add_and_gather, merge_on_ranks, run_all, tensor_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems use gloo")

CPU = torch.device("cpu")
SOON = timedelta(seconds=0.05)
LATER = timedelta(seconds=20)


def connected(comm: TorchComm) -> SocketGroup:
    group = SocketGroup(comm.rank, comm.size)
    group.connect(lambda key, text: comm.gather(text))
    return group


def exchange_at_random(comm: TorchComm, operations: int) -> None:
    """Compare operations of random kinds, sizes and precisions with what they must give."""
    with comm.collective("a test"):
        group = connected(comm)
        assert group.usable
        draw, delay = random.Random(0), random.Random(comm.rank)
        for number in range(operations):
            # Longer than a rank yields, sometimes.
            time.sleep(0.004 * delay.random() ** 4)
            dtype = draw.choice(DTYPES)
            # The longest does not fit into a socket.
            elements = draw.choice([0, 1, 7, 1500, 300_000])
            tensors = [
                tensor_of(number * comm.size + rank, dtype, elements) for rank in range(comm.size)
            ]
            own = tensors[comm.rank].clone()
            if draw.random() < 0.5:
                parts = torch.full((comm.size, *own.shape), 7, dtype=dtype)
                group.gather(parts, own).wait(LATER)
                assert torch.equal(parts, torch.stack(tensors)), (number, elements)
            else:
                group.broadcast(own, 0).wait(LATER)
                assert torch.equal(own, tensors[0]), (number, elements)
        group.close()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tensors_arrive_whole_and_in_order(pool: Pool, ranks: int) -> None:
    pool.run(exchange_at_random, ranks, operations=60)


def through_both(comm: TorchComm, tp_size: int) -> list[Any]:
    """Return what a mesh's collectives give through sockets and through gloo, and the tensors."""
    mesh: Any = comm.on(CPU, tp_size)
    with mesh.collective("a test"):
        groups = [
            group
            for (backend, _), group in comm.world.groups._groups.items()
            if backend == SOCKETS and group.usable
        ]
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        finish = Exchange._finish

        def count(self: Exchange, deadline: float) -> None:
            calls.append(1)
            finish(self, deadline)

        patch.setattr(Exchange, "_finish", count)
        results = []
        for usable in (True, False):
            for group in groups:
                patch.setattr(group, "usable", usable)
            results.append((merge_on_ranks(mesh, 3), add_and_gather(mesh, 7)))
            with mesh.collective("a test"):
                run_all(mesh)
            results.append(len(calls))
    return results


@pytest.mark.parametrize(("ranks", "tp_size", "exchanges"), [(2, 1, 12), (3, 1, 12), (4, 2, 14)])
def test_results_have_the_bits_of_gloo_and_its_traffic(
    pool: Pool, ranks: int, tp_size: int, exchanges: int
) -> None:
    for fast, count, plain, count_after in pool.run(through_both, ranks, tp_size=tp_size):
        assert count_after == count == exchanges, "every small tensor takes the sockets, or none"
        (states, added), (plain_states, plain_added) = fast, plain
        for state, plain_state in zip(states[:2], plain_states[:2], strict=True):
            assert all(map(torch.equal, state, plain_state))
        assert states[2] == plain_states[2]
        assert added.keys() == plain_added.keys()
        for key, value in added.items():
            pairs = zip(value, plain_added[key], strict=True)
            for part, plain_part in pairs:
                same = torch.equal if isinstance(part, Tensor) else type(part).__eq__
                assert same(part, plain_part), key


def come_late(comm: TorchComm) -> list[bool]:
    """Return if a rank's gather was completed before the other had sent, and after."""
    with comm.collective("a test"):
        group = connected(comm)
        parts = torch.zeros(2, 5)
        gather = group.gather(parts, torch.ones(5))
        seen = []
        if comm.rank == 0:
            with pytest.raises(RuntimeError, match="late"):
                gather.wait(SOON)
            seen.append(gather.is_completed() or bool(parts[1].any()))
        comm.gather(None)
        gather.wait(LATER)
        seen.append(gather.is_completed() and bool(parts.all()))
        group.close()
    return seen


def test_a_rank_waits_until_every_part_has_arrived(pool: Pool) -> None:
    assert pool.run(come_late, 2) == [[False, True], [True]]


def leave(comm: TorchComm) -> None:
    with comm.collective("a test"):
        group = connected(comm)
        if comm.rank == 1:
            group.close()
        comm.gather(None)
        if comm.rank == 0:
            gather = group.gather(torch.zeros(3, 5), torch.ones(5))
            with pytest.raises(RuntimeError, match="closed"):
                gather.wait(LATER)
            assert gather.is_completed(), "it will not come any more"
        comm.gather(None)
        group.close()


def test_a_closed_connection_ends_the_wait(pool: Pool) -> None:
    pool.run(leave, 3)


def fail_and_go_on(comm: TorchComm) -> tuple[list[float], bool]:
    """Leave a gather in the middle; return what the next one gives, and if by new sockets."""
    mesh = comm.on(CPU)
    with mesh.collective("a test"):
        before = comm.world.groups.get(SOCKETS, range(comm.size))

    def fail() -> None:
        with mesh.collective("a test"):
            if comm.rank == 1:
                raise ValueError("planted")
            mesh.cp_gather(torch.full((1000,), 5.0))

    with pytest.raises(ValueError, match="planted"):
        fail()
    with mesh.collective("a test"):
        gathered = mesh.cp_gather(torch.tensor([float(comm.rank)]))
        after = comm.world.groups.get(SOCKETS, range(comm.size))
    return gathered.flatten().tolist(), after.usable and after is not before


def test_nothing_of_a_failed_call_arrives_in_the_next(pool: Pool) -> None:
    assert pool.run(fail_and_go_on, 3) == [([0.0, 1.0, 2.0], True)] * 3


def connect_in_vain(comm: TorchComm, name: str, value: Any) -> tuple[bool, list[float]]:
    """Connect where a setting of rank 1 prevents it, then gather."""
    with comm.collective("a test"), pytest.MonkeyPatch.context() as patch:
        if comm.rank == 1:
            patch.setattr(name, value)
        group = connected(comm)
    with comm.collective("a test"):
        gathered = comm.cp_gather(torch.tensor([float(comm.rank)]))
    return group.usable, gathered.flatten().tolist()


def refuse(*_: Any) -> None:
    raise PermissionError("no")


@pytest.mark.parametrize("prevented", ["its folder's name is too long", "it may not connect"])
def test_no_rank_uses_sockets_that_one_cannot_open(
    pool: Pool, tmp_path: Path, prevented: str
) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    name, value = {
        "its folder's name is too long": ("tempfile.tempdir", str(folder)),
        "it may not connect": ("socket.socket.connect", refuse),
    }[prevented]
    results = pool.run(connect_in_vain, 3, name=name, value=value)
    assert results == [(False, [0.0, 1.0, 2.0])] * 3


def pretend_two_hosts(comm: TorchComm, port: int) -> list[range]:
    """Return which ranks have sockets if two ranks of four are on another host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "host_of", lambda device: f"host {comm.rank // 2}")
        own = TorchComm(comm.rank, comm.size, "127.0.0.1", port, name="two hosts", stall_s=20)
        mesh = own.on(CPU, tp_size=2)
        with mesh.collective("a test"):
            assert mesh.tp_sum(torch.ones(3)).tolist() == [2.0] * 3
            assert mesh.cp_gather(torch.ones(3)).shape == (2, 3)
        own.close()
    return [ranks for backend, ranks in own.world.groups._groups if backend == SOCKETS]


def test_ranks_of_different_hosts_have_no_sockets(pool: Pool) -> None:
    first, second = [range(0, 2)], [range(2, 4)]
    assert pool.run(pretend_two_hosts, 4, port=pool.port) == [first, first, second, second]
