"""`star-attention calibrate`: which layers of a model look back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer

from star_attention.calibration.settings import LENGTH, CalibrationSettings
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import Json, Quiet, option
from star_attention.cli.paths import check_output_file
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0
from star_attention.planning.sizes import parse_size


def calibrate(
    model: ModelOptions,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            help="Files to take the contexts from, like those of `generate`; by default Python's"
            " language reference.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        str | None,
        option(
            "Tokens of each context.",
            "--length",
            panel="Calibration",
            metavar="SIZE",
            show_default="2k on CPU, 8k on a GPU",
        ),
    ] = None,
    blocks: Annotated[int, option("Blocks of each context.", panel="Calibration", metavar="N")] = 8,
    samples: Annotated[int, option("Number of contexts.", panel="Calibration", metavar="N")] = 8,
    seed: Annotated[
        int, option("Determines facts and places.", panel="Calibration", metavar="N")
    ] = 0,
    out: Annotated[
        str, option("File to write.", "--out", "-o", panel="Output", metavar="FILE")
    ] = "calibration.json",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure which layers of a model should look back, and write them to a file.

    Facts are planted in a text, and asked for with look-back in groups of layers. The file is for
    `--calibration`, and for `StarLLM.from_pretrained(..., calibration=...)`.

    Example: star-attention calibrate -m models/needle-17m --out needle.json
    """
    text, status = None, Status(quiet=quiet)
    tokens = None if length is None else parse_size(length, "length")
    settings = CalibrationSettings(
        length=tokens or LENGTH, blocks=blocks, samples=samples, seed=seed
    )
    check_output_file(out)
    if files and is_rank_0():
        from star_attention.cli.inputs import read_context

        text = read_context(files, status.say)

    from star_attention.cli import session

    star = session.load_with_tokenizer(model, status)
    from star_attention.calibration import report, run

    if tokens is None:
        settings = replace(settings, length=run.default_length(star))
    calibration, result = run.calibrate(
        star, settings, text=star.from_rank_0(text), progress=status.say
    )
    if is_rank_0():
        calibration.write(out)
        text = report.as_text(calibration, result)
        print(json.dumps(calibration.as_dict()) if as_json else text)
        status.say(f"written to {out}; use it with --calibration {out}")
