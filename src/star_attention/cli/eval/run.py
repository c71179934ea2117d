"""`star-attention eval run` and `report`, and the common parts of all evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star_attention.cli import session
from star_attention.cli.chat_options import template_kwargs
from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.eval.options import FILE_VARIANTS, AnchorSeed, RunOptions, Variants
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import option
from star_attention.cli.paths import check_output_folder
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import InvalidInputError
from star_attention.planning.sizes import counted, parse_size

if TYPE_CHECKING:
    from star_attention.evals.runs.settings import RunSettings
    from star_attention.evals.runs.sources import Source
    from star_attention.evals.runs.variants import Variant
    from star_attention.evals.samples.sample import Sample


def run(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help="Data sets: our own jsonl, or those of Star Attention, RULER, kvpress, BABILong,"
            " InfiniteBench and SCBench.",
        ),
    ],
    model: ModelOptions,
    options: RunOptions,
    format: Annotated[
        str | None,
        option(
            "Format of the files.",
            "--format",
            panel="Data",
            metavar="NAME",
            show_default="detected from their fields",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        option(
            "BABILong's published prompts: babilong/prompts.py of github.com/booydar/babilong"
            " (parsed, not executed), or its DEFAULT_PROMPTS as .json.",
            "--prompts",
            panel="Data",
            metavar="PATH",
            show_default="our own prompts, which the bundled model was trained on",
        ),
    ] = None,
    variants: Variants = FILE_VARIANTS,
    seed: AnchorSeed = 0,
    *,
    settings: Annotated[dict[str, Any], ConfigOptions("allow_special_tokens")],
) -> None:
    """Answer the samples of data sets with several methods, and report.

    Example: star-attention eval run examples/samples.jsonl -m models/needle-17m --chat
    --variants dense,star:256 --out results
    """

    def source() -> Source:
        from star_attention.evals.runs.sources import FileSource

        return FileSource(files=files, format=format, prompts=prompts, seed=seed)

    evaluate(model, options, lambda: parse_variants(variants), source, **settings)


def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER",
            help="A run folder, or several to join in --out.",
        ),
    ],
    out: Annotated[
        str | None,
        option(
            "New folder for runs that are joined.", "--out", "-o", panel="Output", metavar="FOLDER"
        ),
    ] = None,
) -> None:
    """Write the reports of a run again, from its predictions; or join runs, and report.

    Runs can be joined that differ only in their samples or variants.

    Examples: star-attention eval report results

    star-attention eval report gpu0 gpu1 gpu2 --out results
    """
    if out is None and len(folders) > 1:
        raise InvalidInputError(
            f"{len(folders)} folders cannot be joined without a new folder; give one with --out"
        )
    if out is not None:
        from star_attention.evals.runs.merge import join

        join(folders, out)
    print_report(Path(out or folders[0]))


def parse_variants(text: str) -> list[Variant]:
    """Read `--variants`, without importing torch before it is needed."""
    from star_attention.evals.runs.variants import parse_all

    return parse_all(text)


def evaluate(
    model: ModelOptions,
    options: RunOptions,
    variants: Callable[[], list[Variant]],
    source: Callable[[], Source],
    **settings: Any,
) -> None:
    """Make samples, load the model, answer and report.

    Only rank 0 parses arguments and makes samples: if all ranks raised the same error, one of them
    could exit before rank 0 has printed it.

    Args:
        model: Which model, and where.
        options: How answers are made, and where they go.
        variants: Parses the methods.
        source: Parses where the samples come from.
        settings: Settings of `StarConfig` for the engine.
    """
    status = Status(quiet=options.quiet)
    samples: list[Sample] = []
    left_out: dict[str, str] = {}
    parsed_variants: list[Variant] = []
    run_settings: RunSettings | None = None
    if is_rank_0():
        parsed_source, parsed_variants = source(), variants()
        run_settings = _settings(options, parsed_source)
        _check_output(options.out)
        parsed_source.read()
        samples, left_out = _make_samples(
            model, parsed_source, parsed_variants, run_settings, status
        )
        status.say(f"{counted(len(samples), 'sample')}, {counted(len(parsed_variants), 'variant')}")
    star = session.load(model, status, **settings)
    if not options.chat and getattr(star.tokenizer, "chat_template", None):
        status.say("texts are sent as they are; --chat uses this model's chat template")
    from star_attention.evals.runs import runner

    summary = runner.run(
        star,
        samples,
        parsed_variants,
        options.out,
        run_settings,
        left_out=left_out,
        rows=options.rows,
        progress=status.say,
    )
    if not is_rank_0():
        return
    if summary.earlier:
        status.say(f"{summary.earlier:,} answers were already there")
    if summary.skipped:
        status.say(
            f"{summary.skipped:,} samples are too long for the model and were skipped; the report"
            " lists them"
        )
    print_report(summary.folder)


def _check_output(out: str) -> None:
    from star_attention.evals.runs.run_folder import check_output

    check_output_folder(out)
    check_output(Path(out))


def _make_samples(
    model: ModelOptions,
    source: Source,
    variants: list[Variant],
    settings: RunSettings,
    status: Status,
) -> tuple[list[Sample], dict[str, str]]:
    """Check the model; return the samples, and reasons for cells that are left out.

    Whatever the model's config and tokenizer tell is checked first, as making long samples takes
    minutes.
    """
    source.check(variants, settings, session.most_positions(model) or 0)
    config, tokenizer = session.config_and_tokenizer(model, needs_template=settings.chat)

    from star_attention.evals.runs.prompts import check_template
    from star_attention.hf.loading.positions import max_positions

    if settings.chat:
        check_template(tokenizer)
    positions = max_positions(config.get_text_config(decoder=True))
    source.check(variants, settings, positions or 0)
    with status.waiting(f"making samples of {source.suite}"):
        samples, left_out = source.load(
            tokenizer, chat=settings.chat, template_kwargs=settings.chat_template_kwargs
        )
    for name, reason in left_out.items():
        status.say(f"{name} is left out: {reason}")
    return samples, left_out


def _settings(options: RunOptions, source: Source) -> RunSettings:
    from star_attention.evals.runs.settings import RunSettings

    max_new_tokens = options.max_new_tokens
    return RunSettings(
        suite=source.suite,
        options=source.options,
        seed=source.seed,
        chat=options.chat,
        chat_template_kwargs=template_kwargs(options.chat_template_kwargs) or {},
        max_new_tokens=None
        if max_new_tokens is None
        else parse_size(max_new_tokens, "max_new_tokens"),
        limit=options.limit,
        skip_too_long=options.skip_too_long,
    )


def print_report(folder: Path) -> None:
    """Write the reports of a run, and print the result in short and the files."""
    from star_attention.evals.reports import report as reports
    from star_attention.evals.reports.remarks import in_short
    from star_attention.evals.reports.results import Results

    files = reports.write(folder)
    print("\n".join(in_short(Results.read(folder))))
    print("\n" + ", ".join(str(file) for file in files if file.suffix != ".png"))
