"""Run the demo: plant facts, encode the texts in every mode, ask, and write the results."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from star_attention import StarLLM, __version__
from star_attention.demo import report
from star_attention.demo.haystack import Haystack, build_haystack
from star_attention.demo.result import (
    DENSE,
    MODES,
    NONE,
    SMALL,
    STAR,
    DemoResult,
    Example,
    GradedAnswer,
    Trial,
)
from star_attention.demo.settings import DemoSettings
from star_attention.errors import ModelNotFoundError, SizeError
from star_attention.tools.plotting import require_matplotlib

TOKENS_PER_FACT = 64
"""The heat map's contexts have the full length, its half, quarter and eighth, as long as each fact
has this much room. A fact takes about 22 tokens, so these are texts with facts, not lists."""
ANSWER_TOKENS = 12
"""Seven digits, the space before them and the end, with room to notice a longer number."""

Progress = Callable[[str], None]


def run_demo(
    settings: DemoSettings,
    out_dir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> DemoResult:
    """Plant facts in a real text, ask the model about each, and write pictures, a page and JSON.

    At the full length four modes are compared: dense attention; Star Attention with blocks of a
    quarter of the length and an anchor as large; with an anchor of a sixteenth of a block; and with
    no anchor. Shorter lengths run dense and star only, for the heat map over length and depth.

    Args:
        settings: model, lengths and facts.
        out_dir: folder for heatmap.png, demo.html and demo.json; created if it is missing.
        progress: called with a line before the next context.

    Raises:
        MissingPackageError: matplotlib is not installed.
        SizeError, InvalidInputError: as `build_haystack` and `StarLLM.from_pretrained`.
        ModelNotFoundError: the model or its tokenizer is missing.
        OSError: `out_dir` cannot be written.
    """
    started = time.perf_counter()
    require_matplotlib()
    if settings.samples < 1:
        raise SizeError(
            f"samples {settings.samples} is below 1; give the number of contexts of each length"
        )
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    base = StarLLM.from_pretrained(settings.model, dtype=settings.dtype, device=settings.device)
    if base.tokenizer is None:
        raise ModelNotFoundError(
            f"the model at {settings.model} has no tokenizer; the demo asks in text and needs one"
        )
    haystacks = _haystacks(base, settings)
    # The first run in a process pays for setting up memory and kernels.
    shortest = min(haystacks)
    _run_trial(base, DENSE, shortest, haystacks[shortest][0])
    trials = tuple(_run_trials(base, haystacks, progress or (lambda line: None)))
    star_trial = next(t for t in trials if t.mode == STAR and t.length == settings.tokens)
    result = DemoResult(
        trials=trials,
        example=_example(base, haystacks[settings.tokens][0], star_trial),
        settings=_settings_record(settings, base),
        versions=_versions(),
        total_s=time.perf_counter() - started,
    )
    report.write(result, out)
    return result


def _haystacks(base: StarLLM, settings: DemoSettings) -> dict[int, list[Haystack]]:
    """Build the texts by length. The full length is first: it can fail, and the table needs it."""
    lengths = [settings.tokens]
    for divisor in (2, 4, 8):
        if settings.tokens // divisor >= TOKENS_PER_FACT * settings.facts:
            lengths.append(settings.tokens // divisor)
    seeds = range(settings.seed, settings.seed + settings.samples)
    return {
        length: [
            build_haystack(base.tokenizer, length, facts=settings.facts, seed=seed)
            for seed in seeds
        ]
        for length in lengths
    }


def _run_trials(
    base: StarLLM, haystacks: dict[int, list[Haystack]], progress: Progress
) -> Iterator[Trial]:
    full_length = max(haystacks)
    for length, samples in haystacks.items():
        # Modes alternate, so that a machine that slows down affects all of them.
        for number, haystack in enumerate(samples, 1):
            for mode in MODES if length == full_length else (DENSE, STAR):
                trial = _run_trial(base, mode, length, haystack)
                correct = sum(answer.correct for answer in trial.answers)
                progress(
                    f"{trial.tokens:,} tokens, text {number} of {len(samples)}, {mode}:"
                    f" encoded in {trial.encode_s:.1f} s,"
                    f" {correct} of {len(trial.answers)} facts found"
                )
                yield trial


def _engine(base: StarLLM, mode: str, length: int) -> StarLLM:
    if mode == DENSE:
        return base.with_config(method="dense")
    block = -(-length // 4)
    anchor = {STAR: block, SMALL: -(-block // 16), NONE: 0}[mode]
    return base.with_config(method="star", block_size=block, anchor_size=anchor)


def _run_trial(base: StarLLM, mode: str, length: int, haystack: Haystack) -> Trial:
    star = _engine(base, mode, length)
    context = star.encode(haystack.text)
    assert len(context) == haystack.tokens, "the haystack counts tokens as the engine does"
    queries = [fact.query(star.tokenizer) for fact in haystack.facts]
    single = star.generate(context, queries[len(queries) // 2], max_new_tokens=1)
    generations = star.generate(context, queries, max_new_tokens=ANSWER_TOKENS)
    return Trial(
        mode=mode,
        length=length,
        seed=haystack.seed,
        tokens=len(context),
        num_blocks=context.plan.num_blocks,
        block_size=context.plan.block_size,
        anchor_size=context.plan.anchor_size,
        encode_s=context.encode_s,
        first_token_s=single.timings.ttft_s,
        kv_bytes=context.nbytes,
        answers=tuple(
            GradedAnswer(
                key=fact.key,
                number=fact.number,
                depth=fact.depth,
                position=fact.position,
                text=generation.text,
                correct=fact.matches(generation.text),
            )
            for fact, generation in zip(haystack.facts, generations, strict=True)
        ),
    )


def _example(base: StarLLM, haystack: Haystack, trial: Trial) -> Example:
    middle = len(haystack.facts) // 2
    fact = haystack.facts[middle]
    lines = haystack.text.splitlines(keepends=True)
    index = lines.index(fact.line)
    return Example(
        before="".join(lines[max(0, index - 2) : index]),
        line=fact.line,
        after="".join(lines[index + 1 : index + 3]),
        query=fact.query(base.tokenizer),
        answer=trial.answers[middle].text,
    )


def _settings_record(settings: DemoSettings, base: StarLLM) -> dict[str, Any]:
    return {
        "model": str(settings.model),
        "parameters": sum(weight.numel() for weight in base.model.parameters()),
        "tokens": settings.tokens,
        "seed": settings.seed,
        "facts": settings.facts,
        "samples": settings.samples,
        "dtype": settings.dtype,
        "device": _device_name(base.device),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _versions() -> dict[str, str]:
    return {
        "star-attention": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matplotlib": require_matplotlib().__version__,
    }
