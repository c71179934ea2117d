"""The jobs of a run: samples checked, measured, and grouped by context and variant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from star_attention.errors import ContextLengthError, InvalidInputError, quote
from star_attention.evals.metrics.checks import check
from star_attention.evals.runs.prompts import PromptCounter, TemplateMarks
from star_attention.evals.runs.settings import RunSettings
from star_attention.evals.runs.variants import Variant
from star_attention.evals.samples.sample import Sample
from star_attention.planning.sizes import counted

_MANY_ODD_LENGTHS = 3
"""Up to this many lengths of a task that are not round are meant as such; more of them are each
sample's own token count."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One context under one variant, with the samples to answer on it.

    Attributes:
        variant: Index of the variant.
        sizes: Block and anchor size for the engine, in tokens.
        samples: Indices of the samples that have no prediction yet.
        sharing: Number of samples on this context, answered or not.
        tokens: Tokens of the context.
        longest: Index of the sample on this context, answered or not, that needs the most tokens.
    """

    variant: int
    sizes: tuple[int | None, int | None]
    samples: tuple[int, ...]
    sharing: int
    tokens: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Samples that fit into the model's positions, and those that do not.

    Attributes:
        context_tokens: Tokens of the context, by index of the sample.
        needed: Tokens of context, query and answer, likewise.
        skipped: Samples that are too long, with the tokens that they need.
    """

    context_tokens: dict[int, int]
    needed: dict[int, int]
    skipped: list[dict[str, Any]]


def with_nominal_lengths(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples, with the lengths that they are reported under.

    In data sets where every sample has its own token count, that is the power of two at or above
    it, or up to 3 % below, as another tokenizer counts differently. Other lengths stay.
    """
    odd_lengths: dict[str, set[int]] = {}
    for sample in samples:
        if sample.length % 128 and sample.length % 500:
            odd_lengths.setdefault(sample.task, set()).add(sample.length)
    return [
        replace(sample, length=_power_of_two(sample.length))
        if sample.length and len(odd_lengths.get(sample.task, ())) > _MANY_ODD_LENGTHS
        else sample
        for sample in samples
    ]


def _power_of_two(length: int) -> int:
    below = 1 << (length.bit_length() - 1)
    return below if length <= 1.03 * below else 2 * below


def limited(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """Return the first `limit` samples of each task, length and depth; all of them if it is None.

    Raises:
        InvalidInputError: If two samples have the same id, or if there are none.
    """
    ids: set[str] = set()
    counts: dict[tuple[str, int, str], int] = {}
    selected = []
    for sample in samples:
        if sample.id in ids:
            raise InvalidInputError(f"two samples have the id {quote(sample.id)}; make ids unique")
        ids.add(sample.id)
        cell = (sample.task, sample.length, str(sample.meta.get("depth")))
        counts[cell] = counts.get(cell, 0) + 1
        if limit is None or counts[cell] <= limit:
            selected.append(sample)
    if not selected:
        raise InvalidInputError(
            "there are no samples to run; check the data, --samples and --limit"
        )
    return selected


def measure(
    samples: Sequence[Sample],
    tokenizer: Any,
    settings: RunSettings,
    *,
    max_positions: int | None,
    allow_special_tokens: bool | None = None,
    tick: Callable[[str], None],
) -> Measured:
    """Check every sample and count its tokens.

    Args:
        samples: All samples of the run.
        tokenizer: The model's.
        settings: What to count, and whether to skip samples that are too long.
        max_positions: Positions of the model; None for no limit.
        allow_special_tokens: The engine's setting.
        tick: Called for every sample: a sign of life for the other ranks.

    Raises:
        InvalidInputError: For a sample that cannot be answered or scored.
        ContextLengthError: For samples that are too long, unless they are skipped; and if all are.
    """
    counter = PromptCounter(
        tokenizer,
        chat=settings.chat,
        template_kwargs=settings.chat_template_kwargs,
        allow_special_tokens=allow_special_tokens,
    )
    marks = TemplateMarks(tokenizer) if settings.chat else None
    context_tokens: dict[int, int] = {}
    needed: dict[int, int] = {}
    skipped: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        tick("reading samples")
        _check(sample, settings)
        if marks is not None:
            marks.check(sample)
        in_context, in_query = counter.count(sample)
        tokens = in_context + in_query + (settings.max_new_tokens or sample.max_new_tokens)
        if max_positions is not None and tokens > max_positions:
            skipped.append({"sample": sample.id, "tokens": tokens, "positions": max_positions})
        else:
            context_tokens[index], needed[index] = in_context, tokens
    _warn_of_prefixes(samples)
    if skipped and not settings.skip_too_long:
        first = skipped[0]
        raise ContextLengthError(
            f"{len(skipped):,} of {len(samples):,} samples are too long for the model:"
            f" {first['sample']} needs {first['tokens']:,} tokens and the model has"
            f" {max_positions:,} positions; skip them with --skip-too-long, or use a smaller length"
        )
    if not context_tokens:
        raise ContextLengthError(
            f"all {len(samples):,} samples are longer than the model's {max_positions:,} positions;"
            " use a smaller length"
        )
    return Measured(context_tokens=context_tokens, needed=needed, skipped=skipped)


def _warn_of_prefixes(samples: Sequence[Sample]) -> None:
    """Warn of queries that end with the answer prefix already."""
    twice = [
        sample
        for sample in samples
        if sample.query
        and sample.answer_prefix.strip()
        and sample.query.rstrip().endswith(sample.answer_prefix.strip())
    ]
    if twice:
        warnings.warn(
            f"{counted(len(twice), 'sample')}, the first {twice[0].id}, would get the answer prefix"
            f" {quote(twice[0].answer_prefix)} twice, as the query ends with it already; remove it"
            " from one of them",
            stacklevel=2,
        )


def _check(sample: Sample, settings: RunSettings) -> None:
    check(sample)
    if settings.chat and not sample.query:
        raise InvalidInputError(
            f"sample {sample.id} has no query, which a chat requires; leave --chat out"
        )
    if (settings.max_new_tokens or sample.max_new_tokens) < 1:
        raise InvalidInputError(f"sample {sample.id} has max_new_tokens 0; give --max-new-tokens")


def build_jobs(
    samples: Sequence[Sample],
    variants: Sequence[Variant],
    measured: Measured,
    answered: set[tuple[str, str]],
    *,
    own_lengths: bool,
) -> list[Job]:
    """Build a job for every context and variant with samples left to answer.

    Consecutive samples on one context share its encoding.

    Args:
        samples: All samples of the run.
        variants: Every context is answered with each.
        measured: Tokens of the samples; those that it skips are left out.
        answered: Sample id and variant key of the predictions that exist.
        own_lengths: Block sizes that are fractions refer to the context's tokens, whatever length
            the samples state.
    """
    jobs = []

    def context_of(index: int) -> tuple[str, int]:
        return samples[index].context, samples[index].length

    for _, group in groupby(measured.context_tokens, key=context_of):
        indices = list(group)
        tokens = measured.context_tokens[indices[0]]
        # A fraction refers to the length that a sample was made for, so that all samples of that
        # length have the same blocks.
        length = tokens if own_lengths else max(samples[indices[0]].length, tokens)
        for number, variant in enumerate(variants):
            sizes = variant.sizes(length)
            unanswered = tuple(
                index for index in indices if (samples[index].id, variant.key) not in answered
            )
            if unanswered:
                jobs.append(
                    Job(
                        variant=number,
                        sizes=sizes,
                        samples=unanswered,
                        sharing=len(indices),
                        tokens=tokens,
                        longest=max(indices, key=measured.needed.__getitem__),
                    )
                )
    return jobs
