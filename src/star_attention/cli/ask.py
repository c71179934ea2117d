"""`star-attention ask`: answer queries on an encoded text, given as options or typed one by one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from star_attention.cli.options import AnswerOptions, ModelOptions, Quiet
from star_attention.cli.progress import Notes
from star_attention.cli.streams import say
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import StarAttentionError, TextError

if TYPE_CHECKING:
    from star_attention.cli.output import Answerer


def ask(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="An encoded text, made by `encode`.", show_default=False
        ),
    ],
    model: ModelOptions,
    answer: AnswerOptions,
    quiet: Quiet = False,
) -> None:
    """Answer queries on a text that `encode` has written.

    Without a query, on a terminal, it asks for them: one a line, an empty line or Ctrl-D ends. Sizes, method and (with
    --dtype auto) precision are the file's; the model must be the one that encoded it.

    Example: star-attention ask -m models/needle-17m book.star --query "What is the secret number for otter?"
    """
    from star_attention.cli import session
    from star_attention.cli.inputs import read_queries
    from star_attention.cli.output import Answerer

    words = answer.words()
    queries = read_queries(answer.query, answer.query_file, context_files=[]) if is_rank_0() else []
    interactive = sys.stdin.isatty()
    if not queries and not interactive and is_rank_0():
        raise typer.BadParameter(
            "give a query (`--query-file -` reads them from stdin), or use a terminal",
            param_hint="--query or --query-file",
        )
    notes = Notes(quiet=quiet)
    star, context = session.load_saved(model, file, notes)
    queries = star.from_rank_0(queries)
    answerer = Answerer(star, context, answer, words, notes, encoded=False)
    if queries:
        answerer.answer_all(queries)
    else:
        _converse(answerer, notes)


def _converse(answerer: Answerer, notes: Notes) -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history and keys to edit a line)
    notes.say("one question a line; an empty line or Ctrl-D ends")
    while query := answerer.star.from_rank_0(_question() if is_rank_0() else None):
        try:
            answerer.answer(query)
        except (
            StarAttentionError
        ) as error:  # a query that is too long ends itself, not the conversation
            say(f"error: {error}")
        except (
            KeyboardInterrupt
        ):  # so does Ctrl-C during an answer; at the prompt it ends everything
            print(flush=True)
            say("interrupted")


def _question() -> str:
    """The next line without the blanks around it; "" at the end."""
    prompt = "? "
    if not sys.stdout.isatty():  # answers go to a file: keep the prompt out of it
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        print(file=sys.stderr)
        return ""
    except UnicodeDecodeError:
        raise TextError("what was typed is not UTF-8; check the terminal's locale") from None
