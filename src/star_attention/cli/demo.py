"""`star-attention demo`: facts planted in a real long text, asked with and without Star Attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from star_attention.cli.options import Quiet, option
from star_attention.cli.session import check_folder
from star_attention.errors import ModelNotFoundError
from star_attention.planning.plan import parse_size

BUNDLED_MODEL = "models/needle-17m"
"""Where the bundled model lies in a checkout of the repository."""


def demo(
    model: Annotated[
        str, option("Model folder.", "--model", "-m", panel="Demo", metavar="MODEL")
    ] = BUNDLED_MODEL,
    out: Annotated[
        str, option("Folder for the pictures and the page.", panel="Demo", metavar="FOLDER")
    ] = "demo-output",
    tokens: Annotated[str, option("Length of the text.", panel="Demo", metavar="SIZE")] = "16k",
    seed: Annotated[
        int, option("Which facts are planted, and where.", panel="Demo", metavar="N")
    ] = 0,
    quiet: Quiet = False,
) -> None:
    """Plant facts in a long text and ask for them, with dense attention and with Star Attention.

    Prints a table of accuracy, times and memory, and writes a heat map over length and depth as PNG and HTML.

    Example: star-attention demo --out demo-output
    """
    length = parse_size(tokens, "tokens")
    if not Path(model).is_dir():
        raise ModelNotFoundError(
            f"there is no model folder {model}; run this in a checkout of the repository, which brings {BUNDLED_MODEL},"
            " or give another folder with --model"
        )
    check_folder(out)
    from star_attention.demo.run import run_demo, to_stderr
    from star_attention.hf.logs import hide_progress_bars

    hide_progress_bars()
    print(run_demo(model, out, tokens=length, seed=seed, progress=None if quiet else to_stderr))
