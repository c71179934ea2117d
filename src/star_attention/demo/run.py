"""Run the demo: plant, encode in every mode, ask, and write what came of it."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
    Answer,
    DemoResult,
    Example,
    Trial,
)
from star_attention.errors import ModelNotFoundError, SizeError
from star_attention.tools.plotting import require_matplotlib

TOKENS_PER_FACT = 64
"""The heat map's contexts are the full length, its half, quarter and eighth, while they leave each fact this much room (a
fact takes about 22), so that they are text with facts in it and not a list of facts."""
ANSWER_TOKENS = 12
"""Seven digits, the space before them and the end, with room to see a number that goes on too long."""

Progress = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_demo(
    model_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    tokens: int = 16384,
    seed: int = 0,
    facts: int = 30,
    samples: int = 1,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress | None = to_stderr,
) -> DemoResult:
    """Plant facts in a real text, ask the model for each, and write heatmap.png, demo.html and demo.json to `out_dir`.

    At `tokens` tokens: dense attention; Star Attention with blocks of a quarter of that and an anchor as large, one of a
    sixteenth of the block, and none. At shorter lengths dense and star, for the heat map over length and depth.

    facts: planted in each context, one question each. samples: contexts of each length, made from `seed`, `seed + 1`, ...
    progress: called with a line before each context; None for silence.

    Raises `MissingPackageError` without matplotlib, what `build_haystack` and `StarLLM.from_pretrained` raise, and `OSError`
    where `out_dir` cannot be written; all of them before the slow part.
    """
    started = time.perf_counter()
    require_matplotlib()
    if samples < 1:
        raise SizeError(f"samples {samples} is below 1; give the number of contexts of each length")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda line: None)
    base = StarLLM.from_pretrained(model_path, dtype=dtype, device=device)
    if base.tokenizer is None:
        raise ModelNotFoundError(
            f"the model at {model_path} has no tokenizer; the demo asks in text and needs one"
        )
    seeds = range(seed, seed + samples)
    haystacks = {
        length: [build_haystack(base.tokenizer, length, facts=facts, seed=one) for one in seeds]
        for length in _lengths(tokens, facts)
    }
    # What runs first in a process pays for memory and kernels being set up.
    _trial(base, DENSE, min(haystacks), haystacks[min(haystacks)][0])
    trials = list(_trials(base, haystacks, say))
    first = haystacks[tokens][0]
    result = DemoResult(
        trials=tuple(trials),
        example=_example(
            base, first, next(one for one in trials if one.mode == STAR and one.length == tokens)
        ),
        settings={
            "model": str(model_path),
            "parameters": sum(weight.numel() for weight in base.model.parameters()),
            "tokens": tokens,
            "seed": seed,
            "facts": facts,
            "samples": samples,
            "dtype": dtype,
            "device": _device_name(base.device),
            "threads": torch.get_num_threads(),
        },
        versions=_versions(),
        total_s=time.perf_counter() - started,
    )
    report.write(result, out)
    return result


def _lengths(tokens: int, facts: int) -> list[int]:
    """The full length first: it is what can fail, and what the table waits for."""
    return [
        tokens,
        *(tokens // part for part in (2, 4, 8) if tokens // part >= TOKENS_PER_FACT * facts),
    ]


def _trials(base: StarLLM, haystacks: dict[int, list[Haystack]], say: Progress) -> Iterator[Trial]:
    tokens = max(haystacks)
    for length, samples in haystacks.items():
        # Modes take turns, so that a machine that slows down slows all of them down.
        for number, haystack in enumerate(samples, 1):
            for mode in MODES if length == tokens else (DENSE, STAR):
                trial = _trial(base, mode, length, haystack)
                correct = sum(answer.correct for answer in trial.answers)
                say(
                    f"{trial.tokens:,} tokens, text {number} of {len(samples)}, {mode}: encoded in {trial.encode_s:.1f} s,"
                    f" {correct} of {len(trial.answers)} facts found"
                )
                yield trial


def _engine(base: StarLLM, mode: str, length: int) -> StarLLM:
    if mode == DENSE:
        return StarLLM(base.model, base.tokenizer, method="dense")
    block = -(-length // 4)
    anchor = {STAR: block, SMALL: -(-block // 16), NONE: 0}[mode]
    return StarLLM(base.model, base.tokenizer, method="star", block_size=block, anchor_size=anchor)


def _trial(base: StarLLM, mode: str, length: int, haystack: Haystack) -> Trial:
    star = _engine(base, mode, length)
    context = star.encode(haystack.text)
    assert len(context) == haystack.tokens, "the haystack counts tokens as the engine does"
    queries = [fact.query(star.tokenizer) for fact in haystack.facts]
    alone = star.generate(context, queries[len(queries) // 2], max_new_tokens=1)
    replies = star.generate(context, queries, max_new_tokens=ANSWER_TOKENS)
    return Trial(
        mode=mode,
        length=length,
        seed=haystack.seed,
        tokens=len(context),
        num_blocks=context.plan.num_blocks,
        block_size=context.plan.block_size,
        anchor_size=context.plan.anchor_size,
        encode_s=context.encode_s,
        first_token_s=alone.timings.ttft_s,
        kv_bytes=context.nbytes,
        answers=tuple(
            Answer(
                key=fact.key,
                number=fact.number,
                depth=fact.depth,
                position=fact.position,
                text=reply.text,
                correct=fact.found_in(reply.text),
            )
            for fact, reply in zip(haystack.facts, replies, strict=True)
        ),
    )


def _example(base: StarLLM, haystack: Haystack, trial: Trial) -> Example:
    middle = len(haystack.facts) // 2
    fact = haystack.facts[middle]
    lines = haystack.text.splitlines(keepends=True)
    at = lines.index(fact.line)
    return Example(
        before="".join(lines[max(0, at - 2) : at]),
        line=fact.line,
        after="".join(lines[at + 1 : at + 3]),
        query=fact.query(base.tokenizer),
        answer=trial.answers[middle].text,
    )


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})"
    )


def _versions() -> dict[str, str]:
    return {
        "star-attention": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matplotlib": require_matplotlib().__version__,
    }
