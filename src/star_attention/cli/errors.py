"""Errors and warnings of a command: one line each on stderr, and an exit status."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

from star_attention.cli.streams import discard_stdout, say
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import StarAttentionError

# torchao logs, on every import without a matching GPU, which kernels it lacks. Why the hub cannot
# be reached is part of our own error.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "huggingface_hub.utils._http")


@contextmanager
def cli_errors(*, debug: bool) -> Iterator[None]:
    """Turn exceptions into a line on stderr and an exit status: 1 for errors, 130 for Ctrl-C."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`).
        discard_stdout()
        raise typer.Exit(1) from None
    except (StarAttentionError, OSError) as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        raise typer.Exit(1) from None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, on rank 0 only: other ranks would repeat it."""
    if is_rank_0():
        say(f"warning: {message}")
