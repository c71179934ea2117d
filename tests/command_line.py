"""Run the command line in tests: in this process, or in one of its own."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from star_attention.cli import app
from tests.engines import BUNDLED
from tests.warm import python

NOISE = (
    "The hill is tall and the road is long.\n"
    "A cold wind comes down from the north.\n"
    "There is bread on the table.\n"
)
NEEDLE = "The secret number for torpidity-kill is 4910508.\n"
OTHER = "The secret number for lyric-known is 8081780.\n"
QUESTION = "What is the secret number for torpidity-kill?"
OTHER_QUESTION = "What is the secret number for lyric-known?"
MODEL = ["-m", BUNDLED, "--dtype", "float32"]
CHAT = [*MODEL, "--chat", "--block-size", "256"]


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Done:
    """Run the command line in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def ok(*arguments: str | Path, stdin: str | bytes | None = None) -> Done:
    """Run a command that succeeds."""
    done = run(*arguments, stdin=stdin)
    assert done.status == 0, done.err
    return done


def failed(*arguments: str | Path, stdin: str | bytes | None = None) -> str:
    """Run a command that fails, and return its error, which is a single line."""
    done = run(*arguments, stdin=stdin)
    assert done.status == 1, done
    assert done.out == ""
    lines = done.err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line or line.startswith("error: ") for line in lines[:-1])
    return lines[-1]


def usage_error(*arguments: str | Path) -> str:
    """Run a command that is used wrongly, and return stderr without its frame."""
    done = run(*arguments)
    assert done.status == 2, done
    return " ".join(done.err.replace("│", " ").split())


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, with Ctrl-C handled as from a shell."""
    return subprocess.Popen(
        python("-m", "star_attention", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
