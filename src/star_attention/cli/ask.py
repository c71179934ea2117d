"""`star-attention ask`: answer queries about a saved context, from options or typed one by one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.lines import edit_lines, read_line
from star_attention.cli.model_options import SavedModelOptions
from star_attention.cli.options import AnswerOptions, Quiet, TemplateKwargs
from star_attention.cli.progress import Status
from star_attention.cli.streams import say
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import StarAttentionError

if TYPE_CHECKING:
    from star_attention.cli.output import Answerer

_PROMPT = "? "


def ask(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="An encoded text, saved by `encode`.", show_default=False
        ),
    ],
    model: SavedModelOptions,
    answer: AnswerOptions,
    settings: Annotated[dict[str, Any], ConfigOptions("allow_special_tokens")],
    chat_template_kwargs: TemplateKwargs = None,
    quiet: Quiet = False,
) -> None:
    """Answer queries about a text saved by `encode`.

    Without a query, on a terminal, it prompts for queries; an empty line or Ctrl-D ends. Sizes and
    method come from the file, and so do the precision with --dtype auto, and the model without -m.
    Another model than the one that encoded the text is refused.

    Example: star-attention ask book.star
    --query "What is the secret number for quiet-harbor?"
    """
    from star_attention.cli import session
    from star_attention.cli.chat_options import check_choice_on, template_kwargs
    from star_attention.cli.inputs import read_queries
    from star_attention.cli.output import Answerer

    kwargs = answer.generation_kwargs()
    if chat_template_kwargs is not None:
        kwargs["chat_template_kwargs"] = template_kwargs(chat_template_kwargs)
    queries = read_queries(answer.query, answer.query_file, context_files=[]) if is_rank_0() else []
    if not queries and not sys.stdin.isatty() and is_rank_0():
        raise typer.BadParameter(
            "give a query (`--query-file -` reads queries from stdin), or run in a terminal",
            param_hint="--query or --query-file",
        )
    status = Status(quiet=quiet)
    star, context = session.load_saved(
        model, file, status, second_look=answer.second_look, **settings
    )
    check_choice_on(star, context, kwargs)
    queries = star.from_rank_0(queries)
    answerer = Answerer(star, context, answer, kwargs, status, show_encode_time=False)
    if queries:
        answerer.answer_all(queries, batch=answer.batch)
    else:
        _converse(answerer, status)


def _converse(answerer: Answerer, status: Status) -> None:
    edit_lines()
    status.say("type one question per line; an empty line or Ctrl-D ends")
    while query := answerer.star.from_rank_0(_typed() if is_rank_0() else None):
        # An error (say, a query that is too long) or Ctrl-C ends this answer only. At the prompt,
        # Ctrl-C ends the command.
        try:
            answerer.answer(query)
        except StarAttentionError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            print(flush=True)
            say("interrupted")


def _typed() -> str:
    return (read_line(_PROMPT) or "").strip()
