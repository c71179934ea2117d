"""Answer the samples of a run, one after the other or several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from star_attention.engine import StarLLM
from star_attention.evals.metrics import score
from star_attention.evals.runs.engines import encode, engine_for
from star_attention.evals.runs.jobs import Job
from star_attention.evals.runs.predictions import Prediction, sample_sha256, sha256
from star_attention.evals.runs.progress import Progress, ProgressReporter
from star_attention.evals.runs.prompts import content_of, query_kwargs
from star_attention.evals.runs.rows import Rows
from star_attention.evals.runs.settings import GREEDY, RunSettings
from star_attention.evals.runs.variants import Variant
from star_attention.evals.samples.sample import Sample
from star_attention.generation.result import Generation
from star_attention.storage.context import EncodedContext


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready to be answered; on rank 0 only."""

    samples: list[Sample]
    variants: list[Variant]
    jobs: list[Job]
    settings_sha256: str
    file: IO[bytes]
    earlier: int
    skipped: int


def answer_all(
    star: StarLLM,
    variants: Sequence[Variant],
    jobs: Sequence[Job],
    settings: RunSettings,
    prepared: Prepared | None,
    rows: Rows | None,
    progress: Progress | None,
) -> None:
    """Answer all jobs; on other ranks, make the same calls as rank 0.

    Args:
        star: The engine of the run.
        variants: The variants that jobs name.
        jobs: What is to be answered.
        settings: How.
        prepared: The run, on rank 0.
        rows: Answers that run at once; None for one after the other.
        progress: Called with a line every few seconds.
    """
    reporter = ProgressReporter(jobs, progress if prepared is not None else None)
    for job in jobs:
        variant = variants[job.variant]
        engine = engine_for(star, variant, job.sizes)
        if prepared is None:
            _follow(engine, variant, job, settings)
            reporter.job_done(job, variant)
        else:
            job_done = partial(reporter.job_done, job, variant)
            _answer(engine, variant, job, settings, prepared, rows, job_done)
    if rows is not None:
        rows.finish()


def _follow(engine: StarLLM, variant: Variant, job: Job, settings: RunSettings) -> None:
    """Make the same calls as rank 0, whose texts count."""
    context = encode(engine, variant, "", seed=settings.seed)
    for _ in job.samples:
        engine.generate(context, max_new_tokens=1, **GREEDY)


def _answer(
    engine: StarLLM,
    variant: Variant,
    job: Job,
    settings: RunSettings,
    prepared: Prepared,
    rows: Rows | None,
    job_done: Callable[[], None],
) -> None:
    """Answer a job's samples, or begin to, where they are rows of a batch."""

    def arguments(sample: Sample) -> dict[str, Any]:
        most = settings.max_new_tokens or sample.max_new_tokens
        look = {"second_look": variant.second_look} if variant.second_look else {}
        return query_kwargs(sample) | {"max_new_tokens": most} | look | GREEDY

    longest = prepared.samples[job.longest]
    context = encode(
        engine,
        variant,
        content_of(longest, chat=settings.chat),
        seed=settings.seed,
        template_kwargs=settings.chat_template_kwargs,
        answering=arguments(longest),
    )
    left = set(job.samples)

    def done(index: int, started: float, generation: Generation) -> None:
        prediction = _prediction(
            prepared.samples[index],
            context,
            generation,
            variant=variant.key,
            second_look=variant.second_look,
            settings=prepared.settings_sha256,
            sharing=job.sharing,
            answer_s=time.perf_counter() - started,
        )
        prepared.file.write(prediction.to_json().encode())
        prepared.file.flush()
        left.discard(index)
        if not left:
            job_done()

    for index in job.samples:
        begun = partial(done, index, time.perf_counter())
        if rows is None:
            begun(engine.generate(context, **arguments(prepared.samples[index])))
        else:
            rows.add(context, arguments(prepared.samples[index]), begun)


def _prediction(
    sample: Sample, context: EncodedContext, generation: Generation, **recorded: Any
) -> Prediction:
    peaks = [peak for peak in (context.peak_bytes, generation.peak_bytes) if peak is not None]
    return Prediction(
        sample=sample.id,
        task=sample.task,
        group=sample.group,
        length=sample.length,
        sample_sha256=sample_sha256(sample),
        context_sha256=sha256(sample.context),
        prediction=generation.text,
        answers=sample.answers,
        metric=sample.metric,
        score=score(generation.text, sample),
        finish_reason=generation.finish_reason,
        context_tokens=context.plan.context_tokens,
        query_tokens=generation.query_tokens,
        answer_tokens=len(generation.token_ids),
        block_size=context.plan.block_size,
        anchor_size=context.plan.anchor_size,
        blocks=context.plan.num_blocks,
        lookback=context.plan.lookback,
        lookback_layers=context.plan.lookback_layers if context.plan.lookback else None,
        encode_s=context.encode_s,
        peak_bytes=max(peaks, default=None),
        meta=sample.meta,
        reasoning=generation.reasoning,
        query=sample.query + sample.answer_prefix,
        **recorded,
    )
