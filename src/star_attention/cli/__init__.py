"""The command line `star-attention`, one file per command.

A command is imported when it is used, and `--help` imports neither torch nor transformers.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, ClassVar

import typer

from star_attention._version import __version__
from star_attention.cli import bench, config_file
from star_attention.cli import eval as evaluation
from star_attention.cli.lazy import Entry, LazyGroup
from star_attention.cli.streams import open_streams, say, translate_stdout_errors
from star_attention.cli.torchrun import mute_extra_ranks, wait_for_rank_0_error
from star_attention.errors import StarAttentionError

NAME = "star-attention"


class _Root(LazyGroup):
    entries: ClassVar = {
        "generate": Entry(
            "Encode texts and answer queries about them.", "star_attention.cli.generate:generate"
        ),
        "encode": Entry(
            "Encode texts once and save the result, for any number of questions with `ask`.",
            "star_attention.cli.encode:encode",
        ),
        "ask": Entry(
            "Answer queries about a text saved by `encode`.", "star_attention.cli.ask:ask"
        ),
        "chat": Entry(
            "Talk about a text: every question follows the answers before it.",
            "star_attention.cli.chat:chat",
        ),
        "serve": Entry(
            "Serve OpenAI's and Anthropic's APIs over HTTP. A long document is encoded once and"
            " asked many times.",
            "star_attention.cli.serve:serve",
        ),
        "warmup": Entry(
            "Compile what `generate` and `serve` need, and fill the caches on disk.",
            "star_attention.cli.warmup:warmup",
        ),
        "info": Entry(
            "Show what a saved context or a model is, and whether the model can run.",
            "star_attention.cli.info:info",
        ),
        "plan": Entry(
            "Show how a context is split into blocks, and the memory, operations and time it"
            " takes.",
            "star_attention.cli.plan:plan",
        ),
        "estimate": Entry(
            "Estimate the time to encode a context and to generate a token, on given hardware.",
            "star_attention.cli.estimate:estimate",
        ),
        "calibrate": Entry(
            "Measure which layers of a model should look back, and write them to a file.",
            "star_attention.cli.calibrate:calibrate",
        ),
        "demo": Entry(
            "Plant facts in a long text and ask about them, with dense attention and with Star"
            " Attention.",
            "star_attention.cli.demo:demo",
        ),
    }


app = typer.Typer(
    name=NAME,
    cls=_Root,
    no_args_is_help=True,
    # Joins and rewraps the lines of a paragraph.
    rich_markup_mode="markdown",
    # Our errors are one line (errors.py). What remains is a defect, which needs a plain traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add_group(name: str, group: type[LazyGroup], help: str) -> None:
    commands = typer.Typer(cls=group, no_args_is_help=True, rich_markup_mode="markdown")
    app.add_typer(commands, name=name, help=help)


_add_group(
    "bench",
    bench.Group,
    help="Measure speed, next to the hardware's limits and to the alternatives.",
)
_add_group(
    "eval",
    evaluation.Group,
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
