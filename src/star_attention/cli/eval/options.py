"""The options that several commands of `star-attention eval` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from star_attention.cli.options import Quiet, TemplateKwargs, option

PANEL = "Evaluation"
VARIANTS = "dense,star:/4"
"""Variants of a suite, whose samples have lengths."""
FILE_VARIANTS = "dense,star"
"""Variants of the user's own texts: `star` is what `generate` runs."""

Variants = Annotated[
    str,
    option(
        "Methods to compare, separated by commas: METHOD[:BLOCK[:ANCHOR]], such as dense, star"
        " (blocks as `generate` chooses them), star:/4 (a quarter of the length), star:4k:1k,"
        " star:/8:lookback=2@lower (with look-back), star:/8:second_look=0.1 (with a second look),"
        " star:/4:kv=fp8, ring,"
        " streaming_llm:2k:64 (window and sinks).",
        "--variants",
        panel=PANEL,
        metavar="LIST",
    ),
]
Seed = Annotated[
    int, option("Seed of the samples, and of random anchors.", panel=PANEL, metavar="N")
]
AnchorSeed = Annotated[int, option("Seed of random anchors.", "--seed", panel=PANEL, metavar="N")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Output folder of a run, and settings of its answers."""

    out: Annotated[
        str,
        option(
            "Output directory. An existing run is resumed.",
            "--out",
            "-o",
            panel="Output",
            metavar="FOLDER",
        ),
    ]
    limit: Annotated[
        int | None,
        option(
            "Use only the first samples of each task, length and depth.",
            "--limit",
            panel=PANEL,
            metavar="N",
            min=1,
        ),
    ] = None
    chat: Annotated[
        bool,
        option(
            "Send context and query as one user message of the model's chat template.",
            "--chat",
            panel=PANEL,
        ),
    ] = False
    chat_template_kwargs: TemplateKwargs = None
    max_new_tokens: Annotated[
        str | None,
        option(
            "Maximum number of tokens of an answer.",
            "--max-new-tokens",
            panel=PANEL,
            metavar="SIZE",
            show_default="each sample's own",
        ),
    ] = None
    skip_too_long: Annotated[
        bool,
        option(
            "Skip, and list, samples beyond the model's positions.",
            "--skip-too-long",
            panel=PANEL,
        ),
    ] = False
    rows: Annotated[
        int,
        option(
            "Answers at once, in shared decode steps; their contexts are in memory together. The"
            " same answers up to rounding, sooner where they are long beside the contexts.",
            "--rows",
            panel=PANEL,
            metavar="N",
            min=1,
        ),
    ] = 1
    quiet: Quiet = False
