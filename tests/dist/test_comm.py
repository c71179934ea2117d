"""Waiting for other ranks: collectives that end at any moment, and a rank that has given up while its process lives on."""

from __future__ import annotations

import random
import time
from datetime import timedelta

import pytest

from star_attention import world
from star_attention.comm import TorchComm
from star_attention.errors import RankError
from star_attention.watch import Fault
from tests.dist.pool import Pool

ROUNDS = 1000


def polled(comm: TorchComm) -> list[list[int]]:
    """Collectives that are looked at so often that some of them end while one looks."""
    numbers, late = [], random.Random(comm.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "_POLL", timedelta(milliseconds=1))  # (0 would mean for ever)
        for number in range(ROUNDS):
            time.sleep(0.003 * late.random())
            numbers.append(comm.gather(comm.rank * ROUNDS + number))
    return numbers


def test_a_collective_may_end_at_any_moment(pool: Pool) -> None:
    expected = [[number, ROUNDS + number, 2 * ROUNDS + number] for number in range(ROUNDS)]
    assert pool.run(polled, 3) == [expected] * 3


def given_up(comm: TorchComm, port: int) -> str:
    """What a rank raises when rank 1 has found a fault that only it can see."""
    own = TorchComm(comm.rank, comm.size, "127.0.0.1", port, name="given up", stall_s=20)
    with pytest.raises(RankError) as raised, own.call("a test"):
        if own.rank == 1:
            own.watch.fault = Fault(rank=None, where="a test", cause="the cable fell out")
            own.tick()
        own.gather(None)
    with pytest.raises(RankError), own.call("the next call"):
        pass
    return str(raised.value)


def test_a_rank_that_gave_up_tells_the_others(pool: Pool) -> None:
    for said in pool.run(given_up, 3, port=pool.port):
        assert "the cable fell out" in said
