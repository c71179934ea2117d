"""`star-attention eval perplexity`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star_attention.cli import session
from star_attention.cli.eval.options import FILE_VARIANTS, PANEL, AnchorSeed, Variants
from star_attention.cli.eval.run import parse_variants
from star_attention.cli.formatting import table
from star_attention.cli.inputs import read_text
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import Quiet, option
from star_attention.cli.paths import check_output_folder
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0
from star_attention.planning.sizes import counted, parse_size

if TYPE_CHECKING:
    from star_attention.evals.runs.variants import Variant


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """The windows that a text is cut into."""

    length: Annotated[
        str, option("Tokens of a window.", "--length", panel="Data", metavar="SIZE")
    ] = "4k"
    tail: Annotated[
        str,
        option(
            "Tokens to predict, at the end of a window.", "--tail", panel="Data", metavar="SIZE"
        ),
    ] = "512"
    windows: Annotated[
        int | None,
        option(
            "Number of windows, from the start of the text.",
            "--windows",
            panel="Data",
            metavar="N",
            min=1,
            show_default="all",
        ),
    ] = None


def perplexity(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text file in UTF-8.")],
    model: ModelOptions,
    cut: WindowOptions,
    batch: Annotated[
        int, option("Windows to encode at once.", "--batch", panel=PANEL, metavar="N", min=1)
    ] = 4,
    variants: Variants = FILE_VARIANTS,
    seed: AnchorSeed = 0,
    out: Annotated[
        str | None,
        option(
            "Folder for perplexity.json, which has none yet.",
            "--out",
            "-o",
            panel="Output",
            metavar="FOLDER",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Perplexity of the tails of a text given their heads, compared with the first variant.

    Differences are paired by window.

    Example: star-attention eval perplexity examples/book.txt -m models/needle-17m --length 2k
    --tail 256 --variants dense,star:/4
    """
    text, length, tail = "", 0, 0
    parsed_variants: list[Variant] = []
    if is_rank_0():
        parsed_variants, text = parse_variants(variants), read_text(file)
        length, tail = parse_size(cut.length, "length"), parse_size(cut.tail, "tail")
        if out is not None:
            _check_output(out)
    status = Status(quiet=quiet)
    star = session.load(model, status)
    from star_attention.evals.runs import perplexity as measurement

    windows: list[list[int]] = []
    if is_rank_0():
        windows = measurement.windows_of(star.tokenizer, text, length=length, count=cut.windows)
    windows, parsed_variants, tail = star.from_rank_0((windows, parsed_variants, tail))
    rows = measurement.run(
        star, windows, parsed_variants, tail=tail, batch=batch, seed=seed, progress=status.say
    )
    if not is_rank_0():
        return
    print(f"{counted(len(windows), 'window')} of {length:,} tokens, the last {tail:,} predicted\n")
    print(table(measurement.table(rows)))
    if out is not None:
        settings = {"file": file, "length": length, "tail": tail, "seed": seed}
        measurement.write(Path(out), star, rows, text=text, **settings)


def _check_output(out: str) -> None:
    from star_attention.evals.runs.perplexity import check_output

    check_output_folder(out)
    check_output(Path(out))
