"""`distributed` on one process: contexts by key, faults as errors, imports on use."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

import star_attention.distributed
from star_attention.distributed import SoloComm
from star_attention.distributed.comm import Recording
from star_attention.distributed.faults import Fault
from star_attention.distributed.groups import ProcessGroups
from star_attention.distributed.registry import contexts_of
from star_attention.errors import InvalidInputError, RankError, TokenError


class Context:
    """Anything that can be referenced weakly."""


def test_keys_count_up_and_are_not_reused() -> None:
    """Forbids keys that differ between ranks because one of them has dropped its part earlier."""
    registry = contexts_of(rank=0)
    first = Context()
    assert registry.add(first) == 1
    del first
    second = Context()
    assert registry.add(second) == 2
    assert registry.get(2) is second


def test_a_context_that_no_longer_exists_is_refused() -> None:
    registry = contexts_of(rank=2)
    key = registry.add(Context())
    for missing in (key, None, 7):
        with pytest.raises(InvalidInputError, match="rank 2 no longer has its part"):
            registry.get(missing)


def test_a_fault_is_the_exception_that_the_rank_raised() -> None:
    where = "phase 1"
    fault = Fault(rank=3, where=where, cause="", name="TokenError", message="no tokens")
    error = fault.as_error()
    assert isinstance(error, TokenError)
    assert str(error) == "no tokens (on rank 3, in phase 1)"


def test_a_fault_without_an_exception_is_a_rank_error() -> None:
    error = Fault(rank=None, where="phase 2", cause="the cable fell out").as_error()
    assert isinstance(error, RankError)
    assert str(error) == "the ranks failed in phase 2: the cable fell out"


def test_one_process_runs_what_rank_0_runs() -> None:
    comm = SoloComm()
    assert comm.run_on_rank_0(lambda: 7) == 7
    assert comm.gather(5) == [5]
    with pytest.raises(ZeroDivisionError):
        comm.raise_if_any_failed(ZeroDivisionError("planted"))


def test_names_are_imported_on_use() -> None:
    """Forbids that `star-attention --help`, which imports the package, waits for torch."""
    code = (
        "import sys, star_attention.distributed, star_attention.distributed.comm;"
        "assert 'torch' not in sys.modules;"
        "from star_attention.distributed import TorchComm;"
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="has no attribute 'unknown'"):
        star_attention.distributed.unknown  # noqa: B018


class StuckGroup:
    """NCCL's group as the device sees it: it ends once no graph holds its collectives."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.ended = False

    def abort(self) -> None:
        self.ended = self.released.wait(timeout=30)


def test_graphs_are_released_so_that_nccl_can_end() -> None:
    """Forbids a wait for NCCL, which waits for the graphs that hold its collectives."""
    groups = ProcessGroups(None, "test", rank=0, start_s=1.0)
    group, recording = StuckGroup(), Recording()
    recording.release = group.released.set
    groups._groups["nccl", range(2)] = group
    groups.recordings.add(recording)
    groups.abort()
    assert group.ended
