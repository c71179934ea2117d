"""Samples through variants, one prediction a line, so that a run that was killed goes on where it was.

A run is a folder: `run.json` says what the answers depend on, `predictions.jsonl` has them as they come. A prediction is known by
its sample, its variant and a hash of the settings; what is there already is not done again. Consecutive samples on one context
share its encoding. Under torchrun every rank makes the same calls, rank 0 reads, writes and tells.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import groupby, product
from pathlib import Path
from typing import IO, Any

import torch
import transformers

from star_attention import __version__
from star_attention.engine import StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError
from star_attention.evals.metrics import score
from star_attention.evals.runs import run_folder
from star_attention.evals.runs.run_folder import Prediction
from star_attention.evals.runs.variants import Variant
from star_attention.evals.samples.sample import Sample
from star_attention.hf.text import chat as chats
from star_attention.hf.text.tokens import context_ids, query_ids
from star_attention.storage.context import EncodedContext
from star_attention.tools import machine

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
"""The most likely token, whatever the model's own generation settings say."""

SOURCES = ("files", "format", "essays", "squad", "hotpot", "background", "depths")
"""Options that say where samples are from or which there are: they may change from one session to the next, since a sample that is
there already is known by its hash."""

_ODD_LENGTHS = 3
"""So many lengths of a task that are not round are taken as meant; with more, they are each sample's own count."""
_TOLD_EVERY_S = 5.0

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a call of `run` did. made: predictions of this call, found: of earlier ones. skipped: samples that are too long."""

    folder: Path
    made: int
    found: int
    skipped: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One context under one variant, and which samples are still to be answered on it. sizes: block and anchor for the engine."""

    variant: int
    sizes: tuple[int | None, int | None]
    samples: tuple[int, ...]
    sharing: int
    tokens: int


def run(
    star: StarLLM,
    samples: Iterable[Sample],
    variants: Sequence[Variant],
    out: str | Path,
    *,
    suite: str = "files",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    chat: bool = False,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    skip_too_long: bool = False,
    left_out: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Done:
    """Answer every sample under every variant, but for what the folder `out` has already.

    star: a loaded model; its own method and sizes do not count, its other settings do. On several ranks, rank 0's other arguments
    count.
    suite, options, seed: where the samples are from, for the record (seed is also that of random anchors). Shares of the length are
    of what samples were made for, and for the suite "files" of the context's tokens. chat: context and query as one user message of
    the model's chat template. max_new_tokens: of an answer, in place of the samples' own numbers. limit: so many samples of each
    task, length and depth, the first ones. skip_too_long: leave out, and list, what the model has no positions for.
    left_out: what was not made in the first place, with the reason, for the record.

    Answers are greedy and end at an end-of-sequence token. More samples and variants may be added to a folder later.

    Raises `InvalidInputError` for samples that cannot be run, a folder with other settings (naming the field) or a damaged line
    (with its number), and `ContextLengthError` for samples beyond the model's positions; all before the first answer.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InvalidInputError(
            f"max_new_tokens {max_new_tokens} is not a positive number of tokens"
        )
    prepared: list[_Prepared] = []

    def prepare() -> tuple[list[_Job], list[Variant]]:
        prepared.append(
            _prepare(
                star,
                _limited(with_nominal_lengths(list(samples)), limit),
                list(variants),
                Path(out),
                settings={
                    "suite": suite,
                    "options": {
                        name: value
                        for name, value in (options or {}).items()
                        if name not in SOURCES
                    },
                    "seed": seed,
                    "chat": chat,
                    "max_new_tokens": max_new_tokens,
                },
                sources={name: value for name, value in (options or {}).items() if name in SOURCES},
                skip_too_long=skip_too_long,
                left_out=left_out or {},
            )
        )
        return prepared[0].jobs, list(variants)

    with star.runtime.comm.collective("preparing the run"):
        jobs, agreed = star.runtime.comm.run_on_rank_0(prepare)
    leading = prepared[0] if prepared else None
    try:
        _answer_all(
            star,
            agreed,
            jobs,
            leading,
            chat=chat,
            seed=seed,
            max_new_tokens=max_new_tokens,
            told=progress,
        )
    finally:
        if leading is not None:
            leading.file.close()
    if leading is None:
        return Done(folder=Path(out), made=0, found=0, skipped=0)
    return Done(
        folder=Path(out),
        made=sum(len(job.samples) for job in jobs),
        found=leading.found,
        skipped=len(leading.skipped),
    )


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What rank 0 knows beside the jobs."""

    samples: list[Sample]
    jobs: list[_Job]
    settings: str
    file: IO[bytes]
    found: int
    skipped: list[dict[str, Any]]


def _answer_all(
    star: StarLLM,
    variants: list[Variant],
    jobs: list[_Job],
    leading: _Prepared | None,
    *,
    chat: bool,
    seed: int,
    max_new_tokens: int | None,
    told: Progress | None,
) -> None:
    clock = _Eta(jobs, told if leading is not None else None)
    for job in jobs:
        variant = variants[job.variant]
        engine = engine_of(star, variant, job.sizes)
        some = (
            [None for _ in job.samples]
            if leading is None
            else [leading.samples[index] for index in job.samples]
        )
        context = encoded(engine, variant, content_of(some[0], chat=chat), seed=seed)
        for sample in some:
            started = time.perf_counter()
            reply = engine.generate(
                context,
                **({} if sample is None else _asked(sample)),
                max_new_tokens=1 if sample is None else max_new_tokens or sample.max_new_tokens,
                **GREEDY,
            )
            if sample is not None:
                assert leading is not None
                made = _prediction(
                    sample,
                    variant,
                    leading.settings,
                    context,
                    reply,
                    job,
                    time.perf_counter() - started,
                )
                leading.file.write(json.dumps(asdict(made)).encode() + b"\n")
                leading.file.flush()
        del context  # its keys and values, before those of the next
        clock.after(job, variant)


def engine_of(star: StarLLM, variant: Variant, sizes: tuple[int | None, int | None]) -> StarLLM:
    """The same engine with the method and sizes of a variant, in tokens."""
    block, anchor = sizes
    return star.with_config(
        method=variant.method,
        block_size=block,
        anchor_size=anchor,
        kv_dtype=variant.kv_dtype or star.config.kv_dtype,
    )


def encoded(engine: StarLLM, variant: Variant, content: Any, *, seed: int) -> EncodedContext:
    """Phase 1 of a variant; `engine` has its sizes."""
    if variant.ablates:
        from star_attention.evals.runs import ablations

        return ablations.encode(
            engine,
            content,
            anchor=variant.anchor or ablations.CONTENTS[0],
            positions=variant.anchor_positions or ablations.POSITIONS[0],
            seed=seed,
        )
    context: EncodedContext = engine.encode(content)
    return context


def content_of(sample: Sample | None, *, chat: bool) -> Any:
    """What `StarLLM.encode` takes; as a chat, a user message that stays open for the query."""
    if sample is None or not chat:
        return None if sample is None else sample.context
    return chats.user_message(sample.context)


def chat_tokens(tokenizer: Any) -> int:
    """Tokens that a chat template adds to context and query, for `Size.reserve`.

    Raises `InvalidInputError` where the tokenizer has no chat template.
    """
    _check_template(tokenizer)
    context, query = "A context.\n", "A question?"
    plain = len(context_ids(tokenizer, context)) + len(query_ids(tokenizer, query))
    opened = chats.open_context(tokenizer, chats.user_message(context))
    tail = chats.continue_context(tokenizer, opened, query)
    rendered = len(query_ids(tokenizer, opened.head)) + len(query_ids(tokenizer, tail))
    return (
        max(0, rendered - plain) + 2
    )  # (where words meet the template, a token more on each side)


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError("this model has no chat template; leave --chat out")


def _asked(sample: Sample) -> dict[str, Any]:
    """The engine wants a query; where a sample has a prefix of the answer alone, that is one."""
    if not sample.query:
        return {"query": sample.answer_prefix}
    return {"query": sample.query, "answer_prefix": sample.answer_prefix}


def _prediction(
    sample: Sample,
    variant: Variant,
    settings: str,
    context: EncodedContext,
    reply: Any,
    job: _Job,
    answer_s: float,
) -> Prediction:
    peaks = [peak for peak in (context.peak_bytes, reply.peak_bytes) if peak is not None]
    return Prediction(
        sample=sample.id,
        variant=variant.key,
        settings=settings,
        task=sample.task,
        group=sample.group,
        length=sample.length,
        sample_sha256=run_folder.sample_sha256(sample),
        context_sha256=run_folder.sha256(sample.context),
        prediction=reply.text,
        answers=sample.answers,
        metric=sample.metric,
        score=score(reply.text, sample),
        finish_reason=reply.finish_reason,
        context_tokens=context.plan.context_tokens,
        query_tokens=reply.query_tokens,
        answer_tokens=len(reply.token_ids),
        block_size=context.plan.block_size,
        anchor_size=context.plan.anchor_size,
        blocks=context.plan.num_blocks,
        encode_s=context.encode_s,
        sharing=job.sharing,
        answer_s=answer_s,
        peak_bytes=max(peaks, default=None),
        meta=sample.meta,
    )


class _Eta:
    """A line every few seconds: how far it is, and about how long it takes, by tokens of context."""

    def __init__(self, jobs: list[_Job], progress: Progress | None) -> None:
        self._progress = progress
        self._total = sum(len(job.samples) for job in jobs)
        self._left = sum(job.tokens for job in jobs)
        self._done = self._tokens = 0
        self._started = self._told = time.monotonic()

    def after(self, job: _Job, variant: Variant) -> None:
        self._done += len(job.samples)
        self._tokens += job.tokens
        self._left -= job.tokens
        now = time.monotonic()
        last = self._done == self._total
        if self._progress is None or (now - self._told < _TOLD_EVERY_S and not last):
            return
        self._told = now
        spent = now - self._started
        rest = (
            f"in {clock(spent)}"
            if last
            else f"{variant.name}, ETA {clock(spent / self._tokens * self._left)}"
        )
        self._progress(f"{self._done:,} of {self._total:,} answers, {rest}")


def clock(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# ------------------------------------------------------------------------------------------------- before the first answer


def with_nominal_lengths(samples: list[Sample]) -> list[Sample]:
    """Samples with the length that they are reported under.

    In data sets where each sample has its own count of tokens, that is the power of two at or above it (or up to 3 % below, as
    counts of another tokenizer may be); all other lengths stay.
    """
    odd: dict[str, set[int]] = {}
    for sample in samples:
        if sample.length % 128 and sample.length % 500:
            odd.setdefault(sample.task, set()).add(sample.length)
    return [
        replace(sample, length=_power_of_two(sample.length))
        if sample.length and len(odd.get(sample.task, ())) > _ODD_LENGTHS
        else sample
        for sample in samples
    ]


def _power_of_two(length: int) -> int:
    below = 1 << (length.bit_length() - 1)
    return below if length <= 1.03 * below else 2 * below


def _limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first so many of each task, length and depth; ids are unique."""
    seen: set[str] = set()
    counts: dict[tuple[str, int, str], int] = {}
    kept = []
    for sample in samples:
        if sample.id in seen:
            raise InvalidInputError(f"two samples have the id {sample.id!r}; give each its own")
        seen.add(sample.id)
        cell = (sample.task, sample.length, str(sample.meta.get("depth")))
        counts[cell] = counts.get(cell, 0) + 1
        if limit is None or counts[cell] <= limit:
            kept.append(sample)
    if not kept:
        raise InvalidInputError(
            "there are no samples to run; check the data, --samples and --limit"
        )
    return kept


def _prepare(
    star: StarLLM,
    samples: list[Sample],
    variants: list[Variant],
    out: Path,
    *,
    settings: dict[str, Any],
    sources: Mapping[str, Any],
    skip_too_long: bool,
    left_out: Mapping[str, str],
) -> _Prepared:
    if not variants:
        raise InvalidInputError("there are no variants to run; give at least one method")
    if star.tokenizer is None:
        raise InvalidInputError(
            "samples are text, and this model has no tokenizer; give one to StarLLM"
        )
    ablated = next((variant for variant in variants if variant.ablates), None)
    if ablated is not None and (star.runtime.comm.size > 1 or star.runtime.handle.rotaries):
        raise InvalidInputError(
            f"variant {ablated.key!r} changes the anchor, which works on one rank alone and only where rotary frequencies do not"
            " depend on the length; leave such variants out"
        )
    own = settings["suite"] == "files"  # (whose lengths are counts of other tokenizers)
    for variant, length in product(
        variants, set() if own else {sample.length for sample in samples}
    ):
        variant.sizes(length)  # (before anything is written)
    settings = settings | {
        "decoding": "greedy",
        "reserve_tokens": star.config.reserve_tokens,
        "ranks": star.num_ranks,
        "device": star.device.type,
        "versions": versions(),
        "model": run_folder.plain(star.runtime.identity),
    }
    digest = run_folder.sha256(run_folder.canonical(settings))[:12]
    run_folder.check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    before = run_folder.find_run(out)
    if before is not None:
        run_folder.check_same(out, before, settings)
    if settings["chat"]:
        _check_template(star.tokenizer)
    file = run_folder.opened(out / run_folder.PREDICTIONS)
    try:
        found = list(run_folder.read_predictions(out, whole=False))
        run_folder.check_found(out, found, samples, digest)
        lengths, skipped = _measured(star, samples, settings, skip_too_long=skip_too_long)
        jobs = _jobs(
            samples, variants, lengths, {prediction.key for prediction in found}, own_lengths=own
        )
        meant = [samples[index] for index in lengths]
        cells = {variant.key: _cells(before, variant.key, meant, found) for variant in variants}
        run_folder.write_run(
            *(out, before, settings, digest, samples, variants),
            plans=_plans(star, samples, variants, jobs),
            skipped=skipped,
            left_out=left_out,
            cells=cells,
            session=_session(star, jobs, sources),
        )
    except BaseException:
        file.close()
        raise
    return _Prepared(
        samples=samples, jobs=jobs, settings=digest, file=file, found=len(found), skipped=skipped
    )


def versions() -> dict[str, str]:
    """Of what answers depend on."""
    return {
        "star_attention": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _measured(
    star: StarLLM, samples: list[Sample], settings: Mapping[str, Any], *, skip_too_long: bool
) -> tuple[dict[int, int], list[dict[str, Any]]]:
    """Context tokens by a sample's index, without those that are too long; and these, with what they would take."""
    chat, limit = settings["chat"], star.runtime.handle.max_positions
    lengths: dict[int, int] = {}
    skipped: list[dict[str, Any]] = []
    last: tuple[str, int, chats.ChatContext | None] | None = None
    for index, sample in enumerate(samples):
        star.runtime.comm.tick("reading samples")
        if not sample.context or not (sample.query or sample.answer_prefix):
            raise InvalidInputError(
                f"sample {sample.id} has no {'query' if sample.context else 'context'}; each needs text in both"
            )
        if chat and not sample.query:
            raise InvalidInputError(
                f"sample {sample.id} has no query, which a chat needs; leave --chat out"
            )
        # (An unknown metric, or answers that it cannot read, are found now and not after the first answer.)
        if score("", sample) > 0:
            raise InvalidInputError(
                f"sample {sample.id} counts an empty answer as right (answers {list(sample.answers)!r}, metric {sample.metric});"
                " give answers that are not empty"
            )
        answer = settings["max_new_tokens"] or sample.max_new_tokens
        if answer < 1:
            raise InvalidInputError(
                f"sample {sample.id} has max_new_tokens 0; give --max-new-tokens"
            )
        if last is None or last[0] != sample.context:
            opened = None
            if chat:
                opened = chats.open_context(star.tokenizer, content_of(sample, chat=True))
                tokens = len(query_ids(star.tokenizer, opened.head))
            else:
                tokens = len(context_ids(star.tokenizer, sample.context))
            last = (sample.context, tokens, opened)
        _, tokens, opened = last
        asked = (
            sample.query
            if opened is None
            else chats.continue_context(star.tokenizer, opened, sample.query)
        )
        needed = tokens + len(query_ids(star.tokenizer, asked + sample.answer_prefix)) + answer
        if limit is not None and needed > limit:
            skipped.append({"sample": sample.id, "tokens": needed, "positions": limit})
        else:
            lengths[index] = tokens
    if skipped and not skip_too_long:
        one = skipped[0]
        raise ContextLengthError(
            f"{len(skipped):,} of {len(samples):,} samples are too long for the model: {one['sample']} needs {one['tokens']:,}"
            f" tokens and the model has {limit:,} positions; leave them out with --skip-too-long, or give a smaller length"
        )
    if not lengths:
        raise ContextLengthError(
            f"all {len(samples):,} samples are longer than the model's {limit:,} positions"
        )
    return lengths, skipped


def _jobs(
    samples: list[Sample],
    variants: list[Variant],
    lengths: dict[int, int],
    known: set[tuple[str, str]],
    *,
    own_lengths: bool,
) -> list[_Job]:
    """Consecutive samples on one context are one job of each variant; a context that is all answered is none.

    own_lengths: shares are of the context's tokens, whatever length the samples state.
    """
    jobs = []
    for _, group in groupby(
        lengths, key=lambda index: (samples[index].context, samples[index].length)
    ):
        indices = list(group)
        first = samples[indices[0]]
        for number, variant in enumerate(variants):
            # (A share is of the length that a sample was made for, so that blocks are the same for all of that length.)
            tokens = lengths[indices[0]]
            sizes = variant.sizes(tokens if own_lengths else max(first.length, tokens))
            left = tuple(
                index for index in indices if (samples[index].id, variant.key) not in known
            )
            if left:
                jobs.append(
                    _Job(
                        variant=number,
                        sizes=sizes,
                        samples=left,
                        sharing=len(indices),
                        tokens=tokens,
                    )
                )
    return jobs


def _cells(
    before: Mapping[str, Any] | None, variant: str, meant: list[Sample], found: list[Prediction]
) -> list[dict[str, Any]]:
    """How many samples of each task and length a variant has to answer: in earlier sessions or now."""
    made = {one.sample: (one.task, one.length) for one in found if one.variant == variant}
    now = Counter(
        [*made.values(), *((one.task, one.length) for one in meant if one.id not in made)]
    )
    earlier = (
        []
        if before is None or variant not in before["variants"]
        else before["variants"][variant]["cells"]
    )
    counts = Counter({(cell["task"], cell["length"]): cell["samples"] for cell in earlier})
    counts |= now
    return [
        {"task": task, "length": length, "samples": count}
        for (task, length), count in counts.items()
    ]


def _plans(
    star: StarLLM, samples: list[Sample], variants: list[Variant], jobs: list[_Job]
) -> list[tuple[str, dict[str, Any]]]:
    """A variant's key and the blocks that a job of it comes to, for the record."""
    plans = []
    for job in jobs:
        variant = variants[job.variant]
        plan = engine_of(star, variant, job.sizes).runtime.plan_for(job.tokens)
        line: dict[str, Any] = {"length": samples[job.samples[0]].length, "ranks": plan.ranks}
        if variant.has_blocks:
            line |= {"block_size": plan.block_size, "anchor_size": plan.anchor_size}
        plans.append((variant.key, line))
    return plans


def _session(star: StarLLM, jobs: list[_Job], sources: Mapping[str, Any]) -> dict[str, Any]:
    """What this call is, for the record."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": machine.command(),
        "model": str(star.runtime.handle.config.name_or_path),
        "hardware": machine.hardware(star.device),
        "ranks": star.num_ranks,
        "git": machine.git_revision(),
        "options": dict(sources),
        "answers": sum(len(job.samples) for job in jobs),
    }
