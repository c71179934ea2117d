"""`star-attention encode`: encode texts into a file."""

from __future__ import annotations

from typing import Annotated

from star_attention.cli.formatting import context_summary, format_bytes, format_seconds
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import ContextOptions, Files, Quiet, option
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0
from star_attention.planning.sizes import counted


def encode(
    files: Files,
    model: ModelOptions,
    context: ContextOptions,
    output: Annotated[
        str, option("File to write.", "--output", "-o", panel="Output", metavar="FILE")
    ],
    reuse: Annotated[
        str | None,
        option(
            "Saved context of an older version of the text: blocks that are the same are copied"
            " from it. Method, sizes and KV format are the file's.",
            "--reuse",
            panel="Context",
            metavar="FILE",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Encode texts once and save the result, for any number of questions with `ask`.

    The file contains the text and its token ids: protect it like the text. An interrupted run
    leaves no partial file.

    Example: star-attention encode -m models/needle-17m --chat examples/book.txt -o book.star
    """
    from star_attention.cli import reuse as reusing
    from star_attention.cli import session
    from star_attention.cli.chat_options import check_chat
    from star_attention.cli.inputs import read_context
    from star_attention.cli.paths import check_save_path

    text, status = "", Status(quiet=quiet)
    check_chat(context)
    if is_rank_0():
        check_save_path(output)
        text = read_context(files, status.say, html_to_text=context.html_to_text)
    old = None
    if reuse is None:
        star = session.load_for(model, context, status, text=text)
    else:
        star, old = reusing.load(model, reuse, context, status, text=text)
    encoded = session.encode_text(star, text, status, context, save_to=output, reuse=old)
    if old is not None:
        blocks = encoded.plan.num_blocks
        again = f"{blocks - encoded.reused_blocks:,} of {counted(blocks, 'block')}"
        status.say(f"encoded {again} again, copied {encoded.reused_tokens:,} tokens")
    where = " on rank 0" if encoded.plan.ranks > 1 else ""
    status.say(
        f"{context_summary(encoded)}, encode {format_seconds(encoded.encode_s)},"
        f" {format_bytes(encoded.nbytes)} of keys and values{where}"
    )
    session.save(encoded, output, status)
