"""`star-attention generate`: encode texts and answer queries on them."""

from __future__ import annotations

from typing import Annotated

import typer

from star_attention.cli.options import (
    AnswerOptions,
    ContextOptions,
    Files,
    ModelOptions,
    Quiet,
    option,
)
from star_attention.cli.progress import Notes
from star_attention.cli.torchrun import is_rank_0


def generate(
    files: Files,
    model: ModelOptions,
    context: ContextOptions,
    answer: AnswerOptions,
    save: Annotated[
        str | None,
        option(
            "Keep the encoded text in this file too, for `ask`.",
            "--save",
            panel="Output",
            metavar="FILE",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Encode texts and answer queries on them.

    One query is streamed to stdout; several are answered one after another, with a header each.

    Example: star-attention generate -m models/needle-17m --chat book.txt --query "What is the secret number for otter?"
    """
    from star_attention.cli import session
    from star_attention.cli.inputs import read_context, read_queries
    from star_attention.cli.output import Answerer

    words = answer.words()
    text, queries = "", [""]
    if is_rank_0():
        queries = read_queries(answer.query, answer.query_file, context_files=files)
        if not queries:
            raise typer.BadParameter("give a query", param_hint="--query or --query-file")
        session.check_target(save)
        text = read_context(files)
    notes = Notes(quiet=quiet)
    star = session.load_for(model, context, notes)
    text, queries = star.from_rank_0((text, queries))
    encoded = session.encode_text(
        star, text, notes, chat=context.chat, queries=queries, words=words
    )
    if save is not None:
        session.save(encoded, save, notes)
    Answerer(star, encoded, answer, words, notes, encoded=True).answer_all(queries)
