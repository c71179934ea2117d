"""`star-attention encode`: encode texts into a file."""

from __future__ import annotations

from typing import Annotated

from star_attention.cli.options import ContextOptions, Files, ModelOptions, Quiet, option
from star_attention.cli.progress import Notes, context_summary, in_bytes, seconds
from star_attention.cli.torchrun import is_rank_0


def encode(
    files: Files,
    model: ModelOptions,
    context: ContextOptions,
    output: Annotated[
        str, option("The file to write.", "--output", "-o", panel="Output", metavar="FILE")
    ],
    quiet: Quiet = False,
) -> None:
    """Encode texts once and keep them in a file, to be asked any number of times with `ask`.

    The file holds the text's token ids: guard it like the text. It is written whole or not at all.

    Example: star-attention encode -m models/needle-17m --chat book.txt -o book.star
    """
    from star_attention.cli import session
    from star_attention.cli.inputs import read_context

    text = ""
    if is_rank_0():
        session.check_target(output)
        text = read_context(files)
    notes = Notes(quiet=quiet)
    star = session.load_for(model, context, notes)
    encoded = session.encode_text(star, text, notes, chat=context.chat)
    size = in_bytes(encoded.nbytes)
    where = " on rank 0" if encoded.plan.ranks > 1 else ""
    notes.say(
        f"{context_summary(encoded)}, encode {seconds(encoded.encode_s)}, {size} of keys and values{where}"
    )
    session.save(encoded, output, notes)
