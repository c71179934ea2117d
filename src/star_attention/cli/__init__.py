"""The command line `star-attention`: one short file a command. `--help` imports neither torch nor transformers."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from star_attention._version import __version__
from star_attention.cli import bench
from star_attention.cli import eval as evaluation
from star_attention.cli.ask import ask
from star_attention.cli.command import (
    Command,
    command,
    let_the_first_speak,
    open_streams,
    say,
    speak_once_a_machine,
    stdout_told,
)
from star_attention.cli.demo import demo
from star_attention.cli.encode import encode
from star_attention.cli.generate import generate
from star_attention.cli.plan import plan
from star_attention.errors import StarAttentionError

NAME = "star-attention"

app = typer.Typer(
    name=NAME,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # lines of a paragraph are joined and wrapped anew
    # Errors of ours are one line (command.py); what remains are defects, which need a plain traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for function in (generate, encode, ask, plan, demo):
    app.command(cls=Command)(command(function))
benchmarks = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(
    benchmarks,
    name="bench",
    help="Measure speed beside the machine's ceilings and what one would otherwise run.",
)
for benchmark in bench.COMMANDS:
    benchmarks.command(cls=Command)(command(benchmark))
evaluations = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(
    evaluations,
    name="eval",
    help="Measure accuracy: methods side by side on the same samples, with intervals and reports.",
)
for one in evaluation.COMMANDS:
    evaluations.command(cls=Command)(command(one))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Answer questions on long texts with two-phase Star Attention, with any transformers decoder.

    Answers go to stdout, progress and messages to stderr. Sizes are tokens and may be written 4k, 128k or 1m (powers
    of 1024). Exit status: 0 done, 1 failed, with a line `error:` (also for a value that does not work), 2 misuse, with the
    usage (an option that is unknown, missing, or no number in its range), 130 interrupted (torchrun returns 1 for each
    of these).
    """


def main() -> None:
    """Run the command line."""
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # an answer may hold what an old locale cannot write
    speaks = speak_once_a_machine()
    try:
        with stdout_told():  # help and the version
            app(prog_name=NAME)
    except SystemExit as end:
        if end.code and not speaks:
            let_the_first_speak()
        raise
    except StarAttentionError as error:
        say(f"error: {error}")
        sys.exit(1)
