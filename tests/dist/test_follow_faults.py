"""A rank is lost in a session that rank 0 leads: the others end in time, and say which and why.

A pause of rank 0 is no fault, and its end is everybody's.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.dist.test_faults import CAUSES, STALL_S, port, start, wait_for_end

__all__ = ["port"]

QUICK = {
    ("killed", "follow", 0),
    ("stopped", "follow", 1),
    ("hanging", "2", 2),
    ("killed", "help", 2),
}
FAULTS = [
    pytest.param(
        fault, phase, victim, marks=[] if (fault, phase, victim) in QUICK else pytest.mark.slow
    )
    for phase, victims in {"1": (0, 2), "help": (0, 2), "2": (0, 2), "follow": (0, 1)}.items()
    for fault in ("killed", "hanging", "stopped")
    for victim in victims
    # Rank 0 thinks: no fault.
    if (fault, phase, victim) != ("hanging", "follow", 0)
]


def session(pause_s: float, tensor_parallel: int = 1, stall_s: float = STALL_S) -> list[str]:
    return ["session", str(stall_s), str(pause_s), str(tensor_parallel)]


@pytest.mark.parametrize(("fault", "phase", "victim"), FAULTS)
def test_a_lost_rank_ends_the_session(tmp_path: Path, fault: str, phase: str, victim: int) -> None:
    check_session_ends(tmp_path, fault, phase, victim, ranks=3)


def check_session_ends(
    tmp_path: Path,
    fault: str,
    phase: str,
    victim: int,
    *,
    ranks: int,
    tensor_parallel: int = 1,
    stall_s: float = STALL_S,
) -> None:
    """Lose a rank of a session; check that the others end in time with rank, phase and cause."""
    # Rank 0 hears of the fault at its next call, which comes a moment later.
    pause_s = 2 if phase == "follow" else 0
    arguments = [fault, phase, str(victim), *session(pause_s, tensor_parallel, stall_s)]
    processes = start(tmp_path, arguments, ranks)
    statuses, stderrs, _ = wait_for_end(tmp_path, processes, victim)
    assert all(status not in (0, None) for status in statuses), (statuses, stderrs)
    fault_time = tmp_path / "stderr-and-the-time-of-the-fault"
    noticed = [
        float(Path(f"{fault_time}-noticed-by-{rank}").read_text()) - float(fault_time.read_text())
        for rank in range(ranks)
        if rank != victim
    ]
    print(f"{fault} rank {victim} in {phase}: {noticed} s")
    # Python itself takes a while to end on a busy machine.
    assert max(noticed) <= stall_s + 4
    place = {"1": "phase 1", "help": "phase 1", "2": "phase 2"}.get(phase, "")
    for rank, stderr in enumerate(stderrs):
        if rank == victim:
            continue
        line = [line for line in stderr.splitlines() if line.startswith("star_attention.err")][-1]
        assert f"RankError: rank {victim} failed in {place}" in line
        assert any(cause in line for cause in CAUSES[fault]), line


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "phase"), [("killed", "1"), ("stopped", "follow")])
def test_ranks_that_share_heads_end_too(tmp_path: Path, fault: str, phase: str) -> None:
    check_session_ends(tmp_path, fault, phase, 3, ranks=4, tensor_parallel=2)


def test_a_pause_beyond_the_stall_limit_is_no_fault(tmp_path: Path) -> None:
    """Rank 0 then ends without a word, and the others return from follow()."""
    started = time.monotonic()
    stall_s, pause_s = 3, 5
    processes = start(tmp_path, ["none", "1", "0", *session(pause_s, stall_s=stall_s)], 3)
    statuses, stderrs, _ = wait_for_end(tmp_path, processes, None)
    assert (statuses, stderrs) == ([0] * 3, [""] * 3)
    assert time.monotonic() - started > pause_s > stall_s


def test_an_error_right_after_startup_is_rank_0s_own(tmp_path: Path) -> None:
    """The others are still in their startup when rank 0's process ends."""
    processes = start(tmp_path, ["late", "startup", "0", *session(0)], 3)
    statuses, (stderr, *others), _ = wait_for_end(tmp_path, processes, None)
    assert statuses == [1, 0, 0]
    assert stderr.splitlines()[-1] == "ZeroDivisionError: planted"
    assert others == ["", ""]
