"""How a function becomes a command: groups of options spread out, errors and warnings as one line each on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO, get_type_hints

import typer
from typer.core import TyperCommand

from star_attention.errors import StarAttentionError

_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as typer takes it. A parameter that is annotated with a dataclass becomes one option for each field."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _parameters(hints[name])
        else:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            )
    parameters.append(_DEBUG)

    def run(**values: Any) -> None:
        debug = values.pop("debug")
        for name, group in groups.items():
            values[name] = group(
                **{field.name: values.pop(field.name) for field in dataclasses.fields(group)}
            )
        with reported(debug=debug), _one_of_several(), _writing():
            function(**values)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(group: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=hints[field.name],
        )


class Command(TyperCommand):
    """typer's own, whose message on a value that does not work names the value, too: newer ones leave it to pydantic."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            details = getattr(error.__cause__, "errors", None)
            if details is not None:
                error.message += f", not {details()[0]['input']}"
            raise


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Turn what ends a command into a line on stderr and an exit status: 1 for errors, 130 for Ctrl-C."""
    # On import, torchao tells everybody without a matching GPU which kernels it was built without; and why the hub cannot be asked,
    # the error says once.
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        _drop_stdout()  # the reader has gone (`| head`)
        raise typer.Exit(1) from None
    except (StarAttentionError, OSError) as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        raise typer.Exit(1) from None


class _Stdout:
    """Standard output whose failure to write says that it was standard output's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with stdout_told():
            return self._stream.write(text)

    def flush(self) -> None:
        with stdout_told():
            self._stream.flush()


@contextmanager
def stdout_told() -> Iterator[None]:
    """Raises `StarAttentionError` for what cannot be written: the system's own error does not say where. (A reader that has gone is
    none.)
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_stdout()
        raise StarAttentionError(
            f"standard output could not be written ({error.strerror or error}); free space there, or send it elsewhere"
        ) from error


@contextmanager
def _writing() -> Iterator[None]:
    """While a command runs."""
    with contextlib.redirect_stdout(_Stdout(sys.stdout)):
        yield
        sys.stdout.flush()


def _drop_stdout() -> None:
    """What is left to be written goes nowhere: Python would try at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if leads():  # the others would say the same
        say(f"warning: {message}")


def say(text: str) -> None:
    """One line on stderr, whatever the text."""
    # (Written at once: print writes the line's end by itself, and another rank's line may come between.)
    sys.stderr.write(" ".join(text.split()) + "\n")
    sys.stderr.flush()


# ------------------------------------------------------------------------------------------------- several ranks


class Terminated(BaseException):
    """The launcher asks this rank to end (SIGTERM), because another one has."""


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are, by torchrun's environment."""
    rank, size = (
        os.environ.get(name) or default for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    return (int(rank), int(size)) if rank.isdecimal() and size.isdecimal() else (0, 1)


def open_streams() -> None:
    """Streams that were closed when the program began (by cron, a daemon, `>&-`) read as empty and take what is written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process lives)


def speak_once_a_machine() -> bool:
    """What is printed before a command begins (help, misuse) comes from one rank of each machine; whether this is the one."""
    speaks = ranks()[1] == 1 or (os.environ.get("LOCAL_RANK") or "0") == "0"
    if not speaks:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    return speaks


_PATIENCE_S = 5.0


def let_the_first_speak() -> None:
    """Wait before ending for a reason that another rank tells: with the first rank that ends, the launcher ends all others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_PATIENCE_S)


def leads() -> bool:
    """Whether this process speaks for all: rank 0 alone reads texts, prints answers and shows progress."""
    return ranks()[0] == 0


@contextmanager
def _one_of_several() -> Iterator[None]:
    """What a command under torchrun does beside its work: other ranks print nothing, and the end of one is explained."""
    rank, size = ranks()
    if size == 1:
        yield
        return

    def terminate(*_: Any) -> None:
        if (
            _own_ranks() is None
        ):  # nothing to clean up, and importing torch does not let exceptions through as they are
            say(f"rank {rank}: error: {_why_terminated()}")
            os._exit(1)
        raise Terminated

    sys.stdout, sys.stderr = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr
    signal.signal(signal.SIGTERM, terminate)
    status = 0
    try:
        with (
            open(os.devnull, "w") as nothing,
            contextlib.redirect_stdout(sys.stdout if rank == 0 else nothing),
        ):
            yield
        return
    except typer.BadParameter:  # found by rank 0 alone, before it meets the others
        raise
    except KeyboardInterrupt:
        status = 130
        if rank == 0:
            say("interrupted")
    except Terminated:
        status = 1
        say(f"rank {rank}: error: {_why_terminated()}")
    except StarAttentionError as error:
        status = 1
        from star_attention.errors import RankError

        if rank == 0 or isinstance(error, RankError):
            say(f"rank {rank}: error: {error}")
        else:  # it repeats rank 0's own
            let_the_first_speak()
    except Exception as error:  # a defect: with its traceback, where it happened
        status = 1
        if "(on rank " not in str(error):
            traceback.print_exc()
        say(f"rank {rank}: error: {type(error).__name__}: {error}")
    # Collectives that never end would keep the interpreter from ending.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _own_ranks() -> Any:
    """The communicator of this process, once it has met the others. (Imports nothing: a signal may come in the middle of that.)"""
    comm = sys.modules.get("star_attention.distributed.comm")
    return comm.own() if comm is not None and hasattr(comm, "own") else None


def _why_terminated() -> str:
    own = _own_ranks()
    cause = "the launcher ended it (another rank failed before they had met, or it was asked to)"
    return cause if own is None else str(own.diagnosis(cause))
