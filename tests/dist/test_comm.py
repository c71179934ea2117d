"""Waiting for other ranks: collectives end at any moment, ranks give up or never connect."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from star_attention.distributed import TorchComm, world
from star_attention.distributed.faults import Fault
from star_attention.distributed.rendezvous import connect
from star_attention.distributed.watchdog import BUSY, WAITING, Watchdog
from star_attention.errors import RankError
from tests.dist.pool import Pool

ROUNDS = 1000


def gather_while_polling(comm: TorchComm) -> list[list[int]]:
    """Collectives that are polled so often that some of them end during a poll."""
    gathered, delay = [], random.Random(comm.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "POLL", timedelta(milliseconds=1))  # 0 would mean for ever
        for number in range(ROUNDS):
            time.sleep(0.003 * delay.random())
            gathered.append(comm.gather(comm.rank * ROUNDS + number))
    return gathered


def test_a_collective_may_end_at_any_moment(pool: Pool) -> None:
    expected = [[number, ROUNDS + number, 2 * ROUNDS + number] for number in range(ROUNDS)]
    assert pool.run(gather_while_polling, 3) == [expected] * 3


def give_up(comm: TorchComm, port: int) -> str:
    """Return the message of a rank's error when rank 1 has a fault that only rank 1 can see."""
    own = TorchComm(comm.rank, comm.size, "127.0.0.1", port, name="given up", stall_s=20)

    def call() -> None:
        with own.collective("a test"):
            if own.rank == 1:
                cause = "the cable fell out"
                own.world.watchdog.fault = Fault(rank=None, where="a test", cause=cause)
                own.tick()
            own.gather(None)

    with pytest.raises(RankError) as raised:
        call()
    with pytest.raises(RankError), own.collective("the next call"):
        pass
    return str(raised.value)


def test_a_rank_that_gives_up_tells_the_others(pool: Pool) -> None:
    for message in pool.run(give_up, 3, port=pool.port):
        assert "the cable fell out" in message


def test_ranks_that_do_not_connect_are_named() -> None:
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RankError, match=r"ranks 1, 2 did not connect within 0\.2 s"):
        TorchComm(0, 3, "127.0.0.1", master.port, start_s=0.2)


def test_ctrl_c_ends_the_wait_for_others() -> None:
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    interrupt = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    # A shell that starts us in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            TorchComm(0, 2, "127.0.0.1", master.port, start_s=60)
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_loss_of_the_store_ends_what_runs_on_the_device() -> None:
    """Forbids that kernels wait on for a rank that took the store with it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port, ended = server.port, threading.Event()
    watchdog = Watchdog(
        lambda: connect("127.0.0.1", port, 1.0), 1, 2, stall_s=1.0, on_fault=ended.set
    )
    try:
        assert not ended.wait(0.3)
        del server
        assert ended.wait(20)
        assert watchdog.fault is not None
        assert "store is unreachable" in watchdog.fault.cause
    finally:
        watchdog.close()


def test_rank_0_leaves_when_the_others_know_why() -> None:
    """Its store ends with it: they would take rank 0 for the rank at fault."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port, stall_s = server.port, 5.0
    ranks = [
        Watchdog(lambda: connect("127.0.0.1", port, 1.0), rank, 3, stall_s, on_fault=lambda: None)
        for rank in range(3)
    ]
    try:
        for watchdog, state in zip(ranks, (WAITING, WAITING, BUSY), strict=True):
            watchdog.set_state(state)
        ranks[0].fault = Fault(rank=2, where="phase 2", cause="it hangs")
        started = time.monotonic()
        ranks[0].leave("rank 2 failed")
        assert time.monotonic() - started < stall_s / 2
        assert ranks[1].fault == ranks[2].fault == ranks[0].fault
    finally:
        for watchdog in ranks:
            watchdog.close()


def test_the_rank_that_took_the_store_with_it_is_at_fault() -> None:
    """Not one whose last sign of life happens to be older."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = server.port
    ranks = [
        Watchdog(lambda: connect("127.0.0.1", port, 1.0), rank, 3, 5.0, on_fault=lambda: None)
        for rank in range(3)
    ]
    try:
        time.sleep(1)
        del server
        ranks[1]._last_seen[2].beat_at -= 0.5
        fault = ranks[1].find_cause("a connection closed")
        assert (fault.rank, "store is unreachable" in fault.cause) == (0, True)
    finally:
        for watchdog in ranks:
            watchdog.close()
