"""Errors and warnings of a command: one line each on stderr, and an exit status."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from star_attention.cli.streams import discard_stdout, say
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import StarAttentionError, quote

# torchao logs, on every import without a matching GPU, which kernels it lacks. Why the hub cannot
# be reached is part of our own error.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "huggingface_hub.utils._http")


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """How much a command reports.

    Attributes:
        debug: show the traceback of an error.
        verbose: show log messages, of this library and of others.
        quiet: show no warnings.
    """

    debug: bool = False
    verbose: bool = False
    quiet: bool = False


@contextmanager
def cli_errors(reporting: Reporting) -> Iterator[None]:
    """Turn exceptions into a line on stderr and an exit status: 1 for errors, 130 for Ctrl-C."""
    try:
        with warnings.catch_warnings(), _log_messages(verbose=reporting.verbose):
            warnings.showwarning = _Warnings(quiet=reporting.quiet)
            yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`).
        discard_stdout()
        raise typer.Exit(1) from None
    except (StarAttentionError, OSError) as error:
        if reporting.debug:
            traceback.print_exc()
        say(f"error: {_text(error)}")
        raise typer.Exit(1) from None


def _text(error: Exception) -> str:
    """Return an error's message; the operating system's own in words."""
    if isinstance(error, StarAttentionError) or not isinstance(error, OSError):
        return str(error)
    if not error.strerror:
        return str(error)
    if error.filename is None:
        return f"{error.strerror}; check the paths, permissions and free space"
    return (
        f"cannot use {quote(str(error.filename))}: {error.strerror}; check the path, its"
        " permissions and the space there"
    )


@contextmanager
def _log_messages(*, verbose: bool) -> Iterator[None]:
    """Show log messages of every library, or leave out those that mean nothing to users."""
    if not verbose:
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
        return
    handler, root = logging.StreamHandler(), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO if is_rank_0() else logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


class _Warnings:
    """Prints each warning once, as a line, on rank 0 only: other ranks would repeat it."""

    def __init__(self, *, quiet: bool) -> None:
        self._silent = quiet or not is_rank_0()
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, *details: Any, **more: Any) -> None:
        text = f"warning: {message}"
        if not self._silent and text not in self._shown:
            self._shown.add(text)
            say(text)
