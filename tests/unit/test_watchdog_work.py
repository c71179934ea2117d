"""Work without reports, like compiling: CPU time is progress in it, and silence still ends it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore

from star_attention.distributed import cpu_time
from star_attention.distributed.watchdog import BUSY, IDLE, WAITING, Watchdog

STALL_S = 1.0
Ranks = tuple[Watchdog, ...]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Three ranks in a call, of which the first two wait."""
    store = HashStore()
    made = tuple(
        Watchdog(lambda: store, rank, 3, STALL_S, on_fault=lambda: None) for rank in range(3)
    )
    for watchdog, state in zip(made, (WAITING, WAITING, BUSY), strict=True):
        watchdog.set_state(state)
        watchdog.tick("phase 1")
    yield made
    for watchdog in made:
        watchdog.set_state(IDLE)
        watchdog.close()


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def spin_elsewhere(seconds: float) -> None:
    code = f"import time; end = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def seconds_to_fault(watchdog: Watchdog) -> float:
    started = time.monotonic()
    while watchdog.fault is None:
        assert time.monotonic() < started + 20 * STALL_S, "no fault"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.parametrize("work", [spin, spin_elsewhere])
def test_a_rank_that_compiles_is_not_at_fault(ranks: Ranks, work: Callable[[float], None]) -> None:
    with ranks[2].working("compiling"), ranks[2].working("compiling more"):
        work(3 * STALL_S)
    assert [rank.fault for rank in ranks] == [None] * 3
    assert ranks[2].where == "phase 1"


def test_cpu_time_alone_is_no_progress(ranks: Ranks) -> None:
    end = time.monotonic() + 2 * STALL_S
    # No longer than needed: a rank that does not leave after a fault ends its process.
    while ranks[0].fault is None and time.monotonic() < end:
        pass
    fault = ranks[0].fault
    assert fault is not None
    assert fault.rank == 2
    assert "no progress" in fault.cause


def test_a_rank_that_hangs_while_it_compiles_is_at_fault(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ranks[2].working("compiling"):
        spin(STALL_S / 2)
        # Processes that other tests have left to this one may work meanwhile.
        monkeypatch.setattr(cpu_time, "own_seconds", lambda: 0.0)
        monkeypatch.setattr(cpu_time, "seconds_below", lambda: 0.0)
        seconds_to_fault(ranks[0])
    fault = ranks[0].fault
    assert fault is not None
    assert fault.rank == 2
    assert "no progress" in fault.cause
    assert fault.where == "phase 1, compiling"


def test_a_device_that_waits_for_a_working_rank(ranks: Ranks) -> None:
    """Rank 1 is blocked by its device, which waits for a collective that rank 2 has yet to start.

    It was taken for the one that hangs, although rank 2 was working.
    """
    ranks[1].set_state(BUSY)
    ranks[1].waits_on_device, ranks[1].issued = True, 5
    for _ in range(30):
        ranks[2].tick()
        time.sleep(STALL_S / 10)
    assert [rank.fault for rank in ranks] == [None] * 3
    seconds_to_fault(ranks[0])
    fault = ranks[0].fault
    assert fault is not None
    assert fault.rank == 2
