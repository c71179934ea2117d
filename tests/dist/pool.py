"""Real processes that act as ranks: started once for all tests of a session.

A task is a function `task(comm, **arguments)` in a test module. `Pool.run` runs it on the first
`ranks` processes, each with its communicator, and returns what each of them returned. The processes
are forked from a server that has imported torch and transformers once, so that seven of them start
in a second.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from star_attention.distributed import TorchComm

SIZE = 7
STALL_S = 20.0
TIMEOUT_S = 170.0


class Pool:
    """Processes that run tasks as ranks."""

    def __init__(self, size: int = SIZE) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.dist.preload"])
        self.size = size
        self._numbers = itertools.count()
        self._ports = context.Queue()
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, self._ports, self._tasks[rank], self._results),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()
        self.port = self._ports.get(timeout=TIMEOUT_S)

    def run(self, task: Callable[..., Any], ranks: int, **arguments: Any) -> list[Any]:
        """Return the results of all ranks, in order.

        Raises:
            AssertionError: a rank raised (with its traceback), died or took too long.
        """
        number = next(self._numbers)
        for rank in range(ranks):
            self._tasks[rank].put(
                (number, task.__module__, task.__name__, ranks, self.port, arguments)
            )
        deadline = time.monotonic() + TIMEOUT_S
        results: dict[int, Any] = {}
        errors: list[str] = []
        while len(results) + len(errors) < ranks:
            try:
                task_number, rank, succeeded, value = self._results.get(timeout=1)
            except queue.Empty:
                dead = [
                    rank for rank, process in enumerate(self._processes) if not process.is_alive()
                ]
                if dead or time.monotonic() > deadline:
                    raise AssertionError(
                        f"no result from {ranks - len(results)} ranks, {dead} died; {errors}"
                    ) from None
                continue
            if task_number != number:
                continue
            if succeeded:
                results[rank] = value
            else:
                errors.append(f"rank {rank}:\n{value}")
        if errors:
            raise AssertionError("\n".join(errors))
        return [results[rank] for rank in range(ranks)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(rank: int, ports: Any, tasks: Any, results: Any) -> None:
    import torch
    from torch.distributed import TCPStore

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if rank == 0:
        master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports.put(master.port)
    comms: dict[int, TorchComm] = {}
    while True:
        number, module, name, ranks, port, arguments = tasks.get()
        try:
            if ranks not in comms:
                # They share the store, so each number of ranks needs a name of its own.
                comms[ranks] = TorchComm(
                    rank, ranks, "127.0.0.1", port, name=f"of {ranks}", stall_s=STALL_S
                )
            comms[ranks].merge_collective = arguments.pop("merge_collective", None)
            value = getattr(importlib.import_module(module), name)(comms[ranks], **arguments)
            results.put((number, rank, True, value))
        except BaseException:
            results.put((number, rank, False, traceback.format_exc()))
