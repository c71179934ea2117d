"""`star-attention generate`: encode texts and answer queries about them."""

from __future__ import annotations

from typing import Annotated

import typer

from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import AnswerOptions, ContextOptions, Files, Quiet, option
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0


def generate(
    files: Files,
    model: ModelOptions,
    context: ContextOptions,
    answer: AnswerOptions,
    save: Annotated[
        str | None,
        option(
            "Also save the encoded text to this file, for `ask`.",
            "--save",
            panel="Output",
            metavar="FILE",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Encode texts and answer queries about them.

    The answer to a single query is streamed to stdout. Several queries are answered one after
    another, each under a header.

    Example: star-attention generate -m models/needle-17m --chat examples/book.txt
    --query "What is the secret number for quiet-harbor?"
    """
    from star_attention.cli import session
    from star_attention.cli.chat_options import check_chat
    from star_attention.cli.inputs import read_context, read_queries
    from star_attention.cli.output import Answerer
    from star_attention.cli.paths import check_save_path

    kwargs = answer.generation_kwargs()
    check_chat(context)
    status = Status(quiet=quiet)
    text, queries = "", [""]
    if is_rank_0():
        queries = read_queries(answer.query, answer.query_file, context_files=files)
        if not queries:
            raise typer.BadParameter(
                "give a query, or a file with one query per line",
                param_hint="--query or --query-file",
            )
        check_save_path(save)
        text = read_context(files, status.say, html_to_text=context.html_to_text)
    star = session.load_for(model, context, status, text=text, second_look=answer.second_look)
    text, queries = star.from_rank_0((text, queries))
    encoded = session.encode_text(
        star,
        text,
        status,
        context,
        queries=queries,
        generation_kwargs=kwargs,
        save_to=save,
    )
    if save is not None:
        session.save(encoded, save, status)
    answerer = Answerer(star, encoded, answer, kwargs, status, show_encode_time=True)
    answerer.answer_all(queries, batch=answer.batch)
