"""`star-attention demo`: facts planted in a text, found with dense and with Star Attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from star_attention.cli.options import Quiet, option
from star_attention.cli.paths import check_output_folder
from star_attention.cli.streams import say
from star_attention.errors import ModelNotFoundError
from star_attention.planning.sizes import parse_size

BUNDLED_MODEL = "models/needle-17m"
"""The bundled model in a checkout of the repository."""


def demo(
    model: Annotated[
        str, option("Model folder.", "--model", "-m", panel="Demo", metavar="MODEL")
    ] = BUNDLED_MODEL,
    out: Annotated[
        str, option("Folder for the pictures and the page.", panel="Demo", metavar="FOLDER")
    ] = "demo-output",
    tokens: Annotated[str, option("Length of the text.", panel="Demo", metavar="SIZE")] = "16k",
    seed: Annotated[
        int, option("Determines the facts and the text.", panel="Demo", metavar="N")
    ] = 0,
    quiet: Quiet = False,
) -> None:
    """Plant facts in a long text and ask about them, with dense attention and with Star Attention.

    Prints a table of accuracy, times and memory, and writes a heat map over length and depth as PNG
    and HTML.

    Example: star-attention demo --out demo-output
    """
    length = parse_size(tokens, "tokens")
    if not Path(model).is_dir():
        raise ModelNotFoundError(
            f"there is no model folder {model}; run this in a checkout of the repository, which"
            f" contains {BUNDLED_MODEL}, or give another folder with --model"
        )
    check_output_folder(out)
    from star_attention.demo.report import as_text
    from star_attention.demo.run import run_demo
    from star_attention.demo.settings import DemoSettings
    from star_attention.hf.logs import hide_progress_bars

    hide_progress_bars()
    settings = DemoSettings(model=model, tokens=length, seed=seed)
    print(as_text(run_demo(settings, out, progress=None if quiet else say)))
