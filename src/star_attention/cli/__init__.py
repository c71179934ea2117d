"""The command line `star-attention`, one file per command.

`--help` imports neither torch nor transformers.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from star_attention._version import __version__
from star_attention.cli import bench, config_file
from star_attention.cli import eval as evaluation
from star_attention.cli.ask import ask
from star_attention.cli.calibrate import calibrate
from star_attention.cli.chat import chat
from star_attention.cli.command import Command, command
from star_attention.cli.demo import demo
from star_attention.cli.encode import encode
from star_attention.cli.estimate import estimate
from star_attention.cli.generate import generate
from star_attention.cli.info import info
from star_attention.cli.plan import plan
from star_attention.cli.serve import serve
from star_attention.cli.streams import open_streams, say, translate_stdout_errors
from star_attention.cli.torchrun import mute_extra_ranks, wait_for_rank_0_error
from star_attention.errors import StarAttentionError

NAME = "star-attention"

app = typer.Typer(
    name=NAME,
    no_args_is_help=True,
    # Joins and rewraps the lines of a paragraph.
    rich_markup_mode="markdown",
    # Our errors are one line (errors.py). What remains is a defect, which needs a plain traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(group: typer.Typer, functions: Iterable[Callable[..., None]]) -> None:
    for function in functions:
        group.command(cls=Command)(command(function))


def _add_group(name: str, functions: Iterable[Callable[..., None]], help: str) -> None:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    _add(group, functions)
    app.add_typer(group, name=name, help=help)


_add(app, (generate, encode, ask, chat, serve, info, plan, estimate, calibrate, demo))
_add_group(
    "bench",
    bench.COMMANDS,
    help="Measure speed, next to the hardware's limits and to the alternatives.",
)
_add_group(
    "eval",
    evaluation.COMMANDS,
    help="Compare the accuracy of methods on the same samples, with confidence intervals.",
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Answer questions about long texts with two-phase Star Attention and any transformers decoder.

    Answers go to stdout, progress and messages to stderr. Sizes are in tokens and may be written
    as 4k, 128k or 1m (powers of 1024). `star-attention --install-completion` lets bash, zsh, fish
    and PowerShell complete commands and options. Defaults of options may be kept in a file, see
    docs/models.md#defaults.

    Exit status: 0 success; 1 error, reported in a line that starts with `error:`; 2 usage error
    (an unknown or missing option, or a number out of range); 130 interrupted. Under torchrun every
    failure is 1.
    """
    try:
        context.default_map = config_file.defaults(context.command)
    except StarAttentionError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may contain characters that the locale cannot encode.
        sys.stdout.reconfigure(errors="backslashreplace")
    prints = mute_extra_ranks()
    try:
        # Help and the version are printed outside of any command.
        with translate_stdout_errors():
            app(prog_name=NAME)
    except SystemExit as end:
        if end.code and not prints:
            wait_for_rank_0_error()
        raise
    except StarAttentionError as error:
        say(f"error: {error}")
        sys.exit(1)
