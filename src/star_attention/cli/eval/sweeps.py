"""`star-attention eval sweep` and `ablations`: the paper's figures 5a and 5b, and its table 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from star_attention.cli.eval.options import PANEL, RunOptions
from star_attention.cli.eval.run import evaluate
from star_attention.cli.eval.suite_commands import AnySuiteOptions, SuiteData
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import option

if TYPE_CHECKING:
    from star_attention.evals.runs.variants import Variant

_Data = Annotated[SuiteData, AnySuiteOptions()]


def sweep(
    model: ModelOptions,
    options: RunOptions,
    data: _Data,
    blocks: Annotated[
        str,
        option(
            "Block sizes, separated by commas, /4 for a quarter of the length; the anchor is as"
            " large.",
            "--blocks",
            panel=PANEL,
            metavar="SIZES",
        ),
    ] = "/32,/16,/8,/4,/2",
    anchors: Annotated[
        str | None,
        option(
            "Sweep over these anchor sizes instead (0 for none, = for the block size), at the one"
            " size of --blocks.",
            "--anchors",
            panel=PANEL,
            metavar="SIZES",
        ),
    ] = None,
) -> None:
    """Accuracy against block size or anchor size, with dense attention: the paper's figures 5a, 5b.

    Example: star-attention eval sweep -m models/needle-17m --length 8k --blocks /4
    --anchors 0,64,256,1k,= --samples 2 --out anchors
    """
    if anchors is not None and "," in blocks:
        raise typer.BadParameter(
            "--anchors need one block size; give --blocks /4", param_hint="--blocks"
        )

    def variants() -> list[Variant]:
        from star_attention.evals.runs.sweeps import anchor_sweep, block_sweep

        return block_sweep(blocks) if anchors is None else anchor_sweep(blocks, anchors)

    evaluate(model, options, variants, data.source)


def ablations(
    model: ModelOptions,
    options: RunOptions,
    data: _Data,
    block: Annotated[str, option("Block size.", "--block", panel=PANEL, metavar="SIZE")] = "/4",
) -> None:
    """Other tokens in place of the anchor, or other positions, with dense attention: table 4.

    Example: star-attention eval ablations -m models/needle-17m --length 4k --samples 2
    --out ablations
    """

    def variants() -> list[Variant]:
        from star_attention.evals.runs.sweeps import ablation_table

        return ablation_table(block)

    evaluate(model, options, variants, data.source)
