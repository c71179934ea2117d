"""Answer samples with several variants; a run that was killed resumes where it stopped.

A run is a folder: run.json records what the answers depend on, predictions.jsonl holds one answer
per line. A prediction is identified by its sample, its variant and a hash of the settings, and is
never repeated. Under torchrun all ranks make the same calls; rank 0 reads, writes and reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from star_attention import __version__
from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError, quote
from star_attention.evals.runs import record, run_folder
from star_attention.evals.runs.answering import Prepared, answer_all
from star_attention.evals.runs.engines import engine_for
from star_attention.evals.runs.jobs import Job, build_jobs, limited, measure, with_nominal_lengths
from star_attention.evals.runs.predictions import (
    PREDICTIONS,
    Prediction,
    canonical,
    open_predictions,
    read_predictions,
    sha256,
)
from star_attention.evals.runs.progress import Progress
from star_attention.evals.runs.prompts import check_template
from star_attention.evals.runs.rows import Rows
from star_attention.evals.runs.settings import RunSettings
from star_attention.evals.runs.variants import Variant
from star_attention.evals.samples.sample import Sample
from star_attention.tools import machine


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The outcome of one call of `run`.

    Attributes:
        folder: The run folder.
        new: Answers made by this call; 0 on other ranks than the first.
        earlier: Answers that the folder held already.
        skipped: Samples that are too long.
    """

    folder: Path
    new: int
    earlier: int
    skipped: int


def run(
    star: StarLLM,
    samples: Iterable[Sample],
    variants: Sequence[Variant],
    out: str | Path,
    settings: RunSettings | None = None,
    *,
    left_out: Mapping[str, str] | None = None,
    rows: int = 1,
    progress: Progress | None = None,
) -> RunSummary:
    """Answer every sample with every variant, except those that `out` holds answers of.

    Answers are greedy and end at an end-of-sequence token. Samples and variants may be added to a
    folder later. On several ranks, only rank 0's arguments other than `star` matter.

    Args:
        star: A loaded model. The variants replace its method and sizes; its other settings apply.
        samples: Samples with unique ids.
        variants: Methods to answer with.
        out: The run folder, new or of an earlier run with the same settings.
        settings: How samples are made and answered.
        left_out: Samples that were not made, with the reasons, for the record.
        rows: Answers at once, in shared decode steps, on one rank. They are the same up to
            rounding, and their contexts are in memory together.
        progress: Called with a line every few seconds.

    Raises:
        InvalidInputError: For samples that cannot be run, a folder with other settings (naming the
            first one), or a damaged line (with its number).
        ContextLengthError: For samples beyond the model's positions. All errors are raised before
            the first answer.
    """
    settings = settings or RunSettings()
    shared_rows = Rows(star, rows) if rows != 1 else None
    on_rank_0: list[Prepared] = []

    def prepare() -> tuple[list[Job], list[Variant], RunSettings]:
        selected = limited(with_nominal_lengths(list(samples)), settings.limit)
        prepared = _prepare(star, selected, list(variants), Path(out), settings, left_out or {})
        on_rank_0.append(prepared)
        return prepared.jobs, prepared.variants, settings

    with star.runtime.comm.collective("preparing the run"):
        jobs, all_variants, shared_settings = star.runtime.comm.run_on_rank_0(prepare)
    prepared = on_rank_0[0] if on_rank_0 else None
    try:
        answer_all(star, all_variants, jobs, shared_settings, prepared, shared_rows, progress)
    finally:
        if shared_rows is not None:
            shared_rows.close()
        if prepared is not None:
            prepared.file.close()
    if prepared is None:
        return RunSummary(folder=Path(out), new=0, earlier=0, skipped=0)
    return RunSummary(
        folder=Path(out),
        new=sum(len(job.samples) for job in jobs),
        earlier=prepared.earlier,
        skipped=prepared.skipped,
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that answers depend on."""
    return {
        "star_attention": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---------------------------------------------------------------- before the first answer


def _prepare(
    star: StarLLM,
    samples: list[Sample],
    variants: list[Variant],
    out: Path,
    settings: RunSettings,
    left_out: Mapping[str, str],
) -> Prepared:
    """Check everything that can be checked, and write run.json."""
    _check(star, samples, variants, settings)
    recorded = _recorded_settings(star, settings)
    digest = sha256(canonical(recorded))[:12]
    run_folder.check_output(out)
    earlier_run = run_folder.find_run(out)
    if earlier_run is not None:
        run_folder.check_same_settings(out, earlier_run, recorded)
    path = out / PREDICTIONS
    # A folder is made only for a run that can begin.
    file = open_predictions(path) if path.exists() else None
    try:
        predictions = list(read_predictions(out, required=False))
        run_folder.check_predictions(out, predictions, samples, digest)
        measured = measure(
            samples,
            star.tokenizer,
            settings,
            max_positions=star.runtime.handle.max_positions,
            allow_special_tokens=star.config.allow_special_tokens,
            tick=star.runtime.comm.tick,
        )
        jobs = build_jobs(
            samples,
            variants,
            measured,
            {prediction.key for prediction in predictions},
            own_lengths=settings.own_lengths,
        )
        fitting = [samples[index] for index in measured.context_tokens]
        session = record.session_record(
            samples,
            settings=recorded,
            settings_sha256=digest,
            variants=_variants_record(star, samples, variants, jobs, fitting, predictions),
            skipped=measured.skipped,
            left_out=left_out,
            session=_session(star, jobs, settings),
        )
        if file is None:
            out.mkdir(parents=True, exist_ok=True)
            file = open_predictions(path)
        run_folder.write_run(out, record.merged(earlier_run, session))
    except BaseException:
        if file is not None:
            file.close()
        raise
    return Prepared(
        samples=samples,
        variants=variants,
        jobs=jobs,
        settings_sha256=digest,
        file=file,
        earlier=len(predictions),
        skipped=len(measured.skipped),
    )


def _recorded_settings(star: StarLLM, settings: RunSettings) -> dict[str, Any]:
    """Return everything that answers depend on."""
    # Left out where it is the default, as in runs of earlier versions.
    special = star.config.allow_special_tokens
    allowed = {} if special is None else {"allow_special_tokens": special}
    return (
        settings.recorded
        | allowed
        | {
            "decoding": "greedy",
            "reserve_tokens": star.config.reserve_tokens,
            "ranks": star.num_ranks,
            "device": star.device.type,
            "versions": versions(),
            "model": run_folder.plain(star.runtime.identity),
        }
    )


def _check(
    star: StarLLM, samples: list[Sample], variants: list[Variant], settings: RunSettings
) -> None:
    """Run the checks that do not need the run folder."""
    if not variants:
        raise InvalidInputError("there are no variants to run; give at least one method")
    if star.tokenizer is None:
        raise InvalidInputError(
            "samples are text, and this model has no tokenizer; give one to StarLLM"
        )
    ablation = next((variant for variant in variants if variant.is_ablation), None)
    if ablation is not None and (star.runtime.comm.size > 1 or star.runtime.handle.rotaries):
        raise InvalidInputError(
            f"variant {quote(ablation.key)} changes the anchor, which works on one rank"
            " only, and only"
            " if rotary frequencies do not depend on the length; leave such variants out"
        )
    if not settings.own_lengths:
        lengths = {sample.length for sample in samples}
        for variant, length in product(variants, lengths):
            variant.sizes(length)
    if settings.chat:
        check_template(star.tokenizer)


def _variants_record(
    star: StarLLM,
    samples: Sequence[Sample],
    variants: Sequence[Variant],
    jobs: Sequence[Job],
    fitting: Sequence[Sample],
    predictions: Sequence[Prediction],
) -> dict[str, dict[str, Any]]:
    """Return name, resolved block plans and cells of each variant, by key."""
    variants_by_key: dict[str, dict[str, Any]] = {
        variant.key: {
            "name": variant.name,
            "plans": [],
            "cells": record.cells_of_variant(variant.key, fitting, predictions),
        }
        for variant in variants
    }
    for job in jobs:
        variant = variants[job.variant]
        plan = engine_for(star, variant, job.sizes).runtime.plan_for(job.tokens)
        line: dict[str, Any] = {"length": samples[job.samples[0]].length, "ranks": plan.ranks}
        if variant.has_sizes:
            line |= {"block_size": plan.block_size, "anchor_size": plan.anchor_size}
        if plan.lookback:
            line |= {"lookback": plan.lookback, "lookback_layers": plan.lookback_layers}
        if variant.second_look:
            line |= {"second_look": variant.second_look}
        if line not in variants_by_key[variant.key]["plans"]:
            variants_by_key[variant.key]["plans"].append(line)
    return variants_by_key


def _session(star: StarLLM, jobs: Sequence[Job], settings: RunSettings) -> dict[str, Any]:
    """Return the record of this call."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": machine.command(),
        "model": str(star.runtime.handle.config.name_or_path),
        "hardware": machine.hardware(star.device),
        "ranks": star.num_ranks,
        "git": machine.git_revision(),
        "options": settings.sources,
        "answers": sum(len(job.samples) for job in jobs),
    }
