"""The command line under torchrun: one rank prints, and every rank explains its own failure."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from star_attention.cli.streams import say
from star_attention.errors import RankError, StarAttentionError

_WAIT_FOR_RANK_0_S = 5.0


class Terminated(BaseException):
    """The launcher stops this rank (SIGTERM), because another one has failed."""


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, from torchrun's environment."""
    rank = os.environ.get("RANK") or "0"
    size = os.environ.get("WORLD_SIZE") or "1"
    return (int(rank), int(size)) if rank.isdecimal() and size.isdecimal() else (0, 1)


def is_rank_0() -> bool:
    """Return True on rank 0, which alone reads texts, prints answers and shows progress."""
    return rank_and_size()[0] == 0


def mute_extra_ranks() -> bool:
    """Silence all but one rank of each machine, and return True if this rank prints.

    Help and usage errors appear before a command runs, on every rank alike.
    """
    prints = rank_and_size()[1] == 1 or (os.environ.get("LOCAL_RANK") or "0") == "0"
    if not prints:
        # Stays open for the life of the process.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return prints


def wait_for_rank_0_error() -> None:
    """Wait before exiting with an error that another rank reports.

    As soon as one rank exits, the launcher ends all others, perhaps before they have printed.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_WAIT_FOR_RANK_0_S)


@contextmanager
def rank_failures() -> Iterator[None]:
    """Run a command on one of several ranks: mute ranks above 0, and report why this rank ends.

    Does nothing on one process. Ends the process at once on an error: collectives that never
    finish would keep the interpreter alive.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield
        return

    sys.stdout, sys.stderr = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(sys.stdout if rank == 0 else null),
        ):
            yield
        return
    except typer.BadParameter:
        # Raised on rank 0 alone, before it meets the others.
        raise
    except KeyboardInterrupt:
        status = 130
        if rank == 0:
            say("interrupted")
    except Terminated:
        status = 1
        say(f"rank {rank}: error: {_termination_cause()}")
    except StarAttentionError as error:
        status = 1
        if rank == 0 or isinstance(error, RankError):
            say(f"rank {rank}: error: {error}")
        else:
            # A repetition of rank 0's error.
            wait_for_rank_0_error()
    except Exception as error:
        # A defect: the rank that raised it shows the traceback.
        status = 1
        if "(on rank " not in str(error):
            traceback.print_exc()
        say(f"rank {rank}: error: {type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _terminate(*_: Any) -> None:
    """Handle SIGTERM."""
    if _communicator() is None:
        # Nothing to clean up yet, and importing torch swallows exceptions of signal handlers.
        say(f"rank {rank_and_size()[0]}: error: {_termination_cause()}")
        os._exit(1)
    raise Terminated


def _communicator() -> Any:
    """This process's communicator, once it has met the others."""
    # Looks into sys.modules: a signal may arrive in the middle of that module's import.
    environment = sys.modules.get("star_attention.distributed.environment")
    if environment is None or not hasattr(environment, "process_comm"):
        return None
    return environment.process_comm()


def _termination_cause() -> str:
    comm = _communicator()
    cause = (
        "terminated by the launcher"
        " (another rank failed during startup, or the launcher was stopped)"
    )
    return cause if comm is None else str(comm.diagnose(cause))
