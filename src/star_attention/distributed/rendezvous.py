"""Rendezvous of the ranks: from torchrun's environment to a store that rank 0 serves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

from star_attention.errors import InvalidInputError, RankError, first_line, quote

# torch's type information leaves out stores and transports.
dist: Any = torch.distributed

START_S = 300.0
"""Seconds that ranks wait for each other at startup."""

STARTUP = "startup"
"""Name of the call in which a rank fails that does not connect."""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_INSTEAD = "start the processes with torchrun, or pass comm='solo'"

# Stores that the other ranks still read: torchrun's may live in rank 0's process.
_STORES_IN_USE: list[Any] = []


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """A rank's place among `size` ranks, and the store of ours through which they meet.

    server: that store on rank 0, which must keep it alive; None on the other ranks.
    """

    rank: int
    size: int
    host: str
    port: int
    server: Any


def rendezvous(start_s: float = START_S) -> Rendezvous:
    """Find the other ranks through torchrun's environment.

    Raises:
        InvalidInputError: the environment is incomplete or wrong.
        RankError: not all ranks connect within `start_s` seconds.
    """
    _check_environment()
    try:
        return _meet_in_default_group() if dist.is_initialized() else _meet_in_store(start_s)
    except RankError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            None, STARTUP, f"the ranks could not find each other ({first_line(error)})"
        ) from error


def _check_environment() -> None:
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise InvalidInputError(f"the environment lacks {', '.join(missing)}; {_INSTEAD}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise InvalidInputError(f"{name} {quote(os.environ[name])} is not a number; {_INSTEAD}")
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if int(rank) >= int(size):
        raise InvalidInputError(f"RANK {rank} is not below WORLD_SIZE {size}; {_INSTEAD}")


def _meet_in_default_group() -> Rendezvous:
    """Exchange the port over torch's default group, which occupies the environment's address."""
    rank, size, host = dist.get_rank(), dist.get_world_size(), os.environ["MASTER_ADDR"]
    server = listen(host) if rank == 0 else None
    port: list[Any] = [server.port if server is not None else None]
    dist.broadcast_object_list(port, src=0)
    return Rendezvous(rank=rank, size=size, host=host, port=int(port[0]), server=server)


def _meet_in_store(start_s: float) -> Rendezvous:
    """Exchange the port through torchrun's own store."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=start_s)))
    store = dist.PrefixStore("star-attention", store)
    host = os.environ["MASTER_ADDR"]
    server = None
    if rank == 0:
        server = listen(host)
        store.set("port", str(server.port))
    wait_for_ranks(store, {"port": 0}, start_s)
    port = int(store.get("port"))
    _STORES_IN_USE.append(store)
    return Rendezvous(rank=rank, size=size, host=host, port=port, server=server)


def listen(host: str) -> Any:
    """Serve a store on a free port of this machine."""
    timeout = timedelta(seconds=START_S)
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def connect(host: str, port: int, timeout_s: float) -> Any:
    """Return a client of the store that rank 0 serves."""
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def wait_for_ranks(
    store: Any, keys: dict[str, int], start_s: float, check: Callable[[], None] | None = None
) -> None:
    """Wait until the ranks have set their keys (key to rank); Ctrl-C and `check` can end it.

    Raises:
        RankError: names the ranks that do not connect within `start_s` seconds.
    """
    deadline = time.monotonic() + start_s
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            late = [rank for key, rank in keys.items() if not store.check([key])]
            who = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
            rank = late[0] if len(late) == 1 else None
            raise RankError(rank, STARTUP, f"{who} did not connect within {start_s:g} s")
        if check is not None:
            check()
        time.sleep(0.01)
