"""The communicator of a process: the caller's, torchrun's ranks, or a single process."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch.distributed as dist

from star_attention.config import STALL_S
from star_attention.distributed.collectives import MeshComm
from star_attention.distributed.comm import Comm
from star_attention.distributed.solo import SoloComm
from star_attention.distributed.torch_comm import TorchComm
from star_attention.errors import InvalidInputError, quote

_PROCESS_COMM: list[TorchComm] = []  # at most one, for all engines of a process


def from_environment(comm: Any, *, stall_s: float = STALL_S) -> Comm:
    """Return the communicator that `StarLLM(comm=...)` means.

    Args:
        comm: a communicator; "solo" for one process; or None for torchrun's ranks where the
            environment names several, else one process.
        stall_s: stall limit in seconds; applies when the first engine of a process is created.

    Raises:
        InvalidInputError: `comm` is something else, or torchrun's environment is incomplete.
        RankError: not all ranks connect.
    """
    if isinstance(comm, (SoloComm, MeshComm)):
        return comm
    if comm not in (None, "solo"):
        raise InvalidInputError(
            f"comm {quote(comm)} is unknown; use None, 'solo' for one process, or a TorchComm"
        )
    if comm == "solo" or not _has_several_ranks():
        return SoloComm()
    if not _PROCESS_COMM:
        _PROCESS_COMM.append(TorchComm.from_environment(stall_s=stall_s))
        atexit.register(_PROCESS_COMM[0].close)
    return _PROCESS_COMM[0]


def _has_several_ranks() -> bool:
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        return True
    return dist.is_initialized() and dist.get_world_size() > 1


def process_comm() -> TorchComm | None:
    """Return the communicator that this process made from torchrun's environment, if any."""
    return _PROCESS_COMM[0] if _PROCESS_COMM else None
