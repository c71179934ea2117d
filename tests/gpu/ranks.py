"""Processes that act as ranks on GPUs: each has its own if there are enough, else all share one.

Where they share one, `shared_gpu/sitecustomize.py` makes NCCL take each for a machine of its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from star_attention.distributed import TorchComm, collectives

SHARED_GPU = Path(__file__).parent / "shared_gpu"
TIMEOUT_S = 400
STALL_S = 10


def run(
    task: Callable[..., Any], ranks: int, *, nccl_alone: bool = False, **arguments: Any
) -> list[Any]:
    """Return what `task(comm, device, **arguments)` returns on each rank.

    Args:
        task: a function of a module.
        ranks: number of processes.
        nccl_alone: no exchange through GPU memory, as between machines.
        arguments: of the task.

    Raises:
        AssertionError: a rank raised; with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    ports, results = context.Queue(), context.Queue()
    own_gpus = torch.cuda.device_count() >= ranks
    before = dict(os.environ)
    processes = []
    try:
        if not own_gpus:
            paths = [str(SHARED_GPU), os.environ.get("PYTHONPATH", "")]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        for rank in range(ranks):
            # `sitecustomize` reads it when the process starts.
            os.environ["RANK"] = str(rank)
            device = f"cuda:{rank if own_gpus else 0}"
            place = (rank, ranks, device, nccl_alone, ports, results)
            processes.append(
                context.Process(
                    target=_serve, args=(*place, task.__module__, task.__name__, arguments)
                )
            )
            processes[-1].start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    answers = dict(results.get(timeout=TIMEOUT_S) for _ in range(ranks))
    for process in processes:
        process.join(STALL_S)
        process.kill()
    failures = [answer for failed, answer in answers.values() if failed]
    assert not failures, "\n".join(failures)
    return [answers[rank][1] for rank in range(ranks)]


def _serve(
    rank: int,
    size: int,
    device: str,
    nccl_alone: bool,
    ports: Any,
    results: Any,
    module: str,
    name: str,
    arguments: dict[str, Any],
) -> None:
    # `from_environment` is not to find it.
    os.environ.pop("RANK")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if nccl_alone:
        collectives.host_of = lambda device: f"machine {rank}"
    try:
        torch.cuda.set_device(device)
        master = None
        if rank == 0:
            master = torch.distributed.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
            for _ in range(size - 1):
                ports.put(master.port)
        port = ports.get() if master is None else master.port
        comm = TorchComm(rank, size, "127.0.0.1", port, master=master, stall_s=STALL_S)
        answer = getattr(importlib.import_module(module), name)(comm, device, **arguments)
        results.put((rank, (False, answer)))
        if comm.world.broken is None:
            comm.gather("nobody leaves before all are done")
    except BaseException:
        results.put((rank, (True, f"rank {rank}:\n{traceback.format_exc()}")))
