"""Standard streams: messages on stderr, and one readable error when stdout cannot be written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from star_attention.errors import StarAttentionError


def say(text: str) -> None:
    """Print `text` on stderr as one line."""
    # A single write: print() writes the line break separately, and another rank's line may come
    # between.
    sys.stderr.write(" ".join(text.split()) + "\n")
    sys.stderr.flush()


def open_streams() -> None:
    """Replace streams that were closed before the program started (cron, daemons, `>&-`)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Stays open for the life of the process.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


class _GuardedStdout:
    """A stream whose write errors say that they come from standard output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with translate_stdout_errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with translate_stdout_errors():
            self._stream.flush()


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """Replace `sys.stdout` by a guarded stream, and flush it at the end."""
    with contextlib.redirect_stdout(_GuardedStdout(sys.stdout)):
        yield
        sys.stdout.flush()


@contextmanager
def translate_stdout_errors() -> Iterator[None]:
    """Raise `StarAttentionError` when standard output cannot be written.

    The operating system's own error does not name the stream. A broken pipe passes through.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise StarAttentionError(
            f"cannot write to standard output ({error.strerror or error});"
            " free some space, or redirect it"
        ) from error


def discard_stdout() -> None:
    """Discard pending output: Python would try to flush it at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
