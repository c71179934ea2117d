"""Processes that share one GPU, or have one each, and reach each other's memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from star_attention.distributed.cuda_memory import CudaMemory
from star_attention.distributed.peers import PeerGroup

TIMEOUT_S = 150.0


class Ranks:
    """One of several processes, its peers, and a plain exchange of objects between them."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank, self.size = rank, size
        gpus = torch.cuda.device_count()
        self.own_gpu = gpus >= size
        self.device = torch.device("cuda", rank if self.own_gpu else 0)
        torch.cuda.set_device(self.device)
        self.store = dist.TCPStore("127.0.0.1", port, size, rank == 0)
        self._exchanges = 0
        self.peers = PeerGroup(rank, size, CudaMemory())
        self.peers.connect(self.exchange)
        assert self.peers.usable, "no access to the other processes' GPU memory"

    def exchange(self, key: str, text: str) -> list[str]:
        """Return all ranks' texts."""
        self._exchanges += 1
        name = f"{self._exchanges}/{key}"
        self.store.set(f"{name}/{self.rank}", text)
        return [self.store.get(f"{name}/{rank}").decode() for rank in range(self.size)]

    def meet(self) -> None:
        self.exchange("meet", "here")

    def same_bits(self, *tensors: torch.Tensor) -> None:
        """Compare tensors with those of the other ranks."""
        sums = [
            hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()).hexdigest()
            for tensor in tensors
        ]
        assert len(set(self.exchange("bits", " ".join(sums)))) == 1, "ranks differ"


def run(task: Callable[..., Any], size: int, **arguments: Any) -> list[Any]:
    """Return what `task(ranks, **arguments)` returns in each of `size` processes.

    Raises:
        AssertionError: a process raised (with its traceback), died or took too long.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_serve, args=(task, rank, size, port, results, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    values: dict[int, Any] = {}
    errors = []
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(values) + len(errors) < size:
            try:
                rank, succeeded, value = results.get(timeout=1)
            except queue.Empty:
                dead = [rank for rank, p in enumerate(processes) if p.exitcode not in (None, 0)]
                if errors or dead or time.monotonic() > deadline:
                    raise AssertionError(f"no result from all; died: {dead}; {errors}") from None
                continue
            if succeeded:
                values[rank] = value
            else:
                errors.append(f"rank {rank}:\n{value}")
        if errors:
            raise AssertionError("\n".join(errors))
        return [values[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _serve(
    task: Any, rank: int, size: int, port: int, results: Any, arguments: dict[str, Any]
) -> None:
    try:
        ranks = Ranks(rank, size, port)
        value = task(ranks, **arguments)
        torch.cuda.synchronize()
        # Nobody leaves while another still writes into its memory.
        ranks.meet()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
