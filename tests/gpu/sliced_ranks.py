"""Weights in slices on GPU ranks, under torchrun: the same answers as whole weights, and times.

    torchrun --nproc-per-node 2 tests/gpu/sliced_ranks.py check
    torchrun --nproc-per-node 2 tests/gpu/sliced_ranks.py time 131072 16384

`check` compares logits of the bundled model, `time` measures a token with the shapes of an 8B
model. Rank 0 prints a line of JSON for each case.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from star_attention import Generation, StarLLM
from star_attention.bench.models import load_model, random_ids
from star_attention.hf.execution import slices

MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
QUERY_TOKENS, TOKENS = 64, 33


def say(star: StarLLM, **row: Any) -> None:
    if star.rank == 0:
        print(json.dumps(row), flush=True)


def check(dtype: str) -> None:
    """Compare answers with weights whole and in slices, by graphs and eager."""
    star = StarLLM.from_pretrained(MODEL, dtype=dtype, block_size=1024)
    model = star.model
    context = star.encode(random_ids(model, 5000))
    queries = [random_ids(model, length, seed=length).tolist() for length in (7, 40)]
    length: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True, return_logits=True)
    whole = star.with_config(slice_weights=False).generate(context, queries, **length)
    engine = star.with_config(slice_weights=True)
    for name, asked in (("batch", queries), ("first alone", queries[:1]), ("again", queries[:1])):
        sliced = engine.generate(context, asked, **length)
        errors = [error_of(reply, expected) for reply, expected in zip(sliced, whole, strict=False)]
        say(
            star,
            case=f"{dtype} {name}",
            parts=list(slices.choose(star.runtime.handle, star.runtime.comm, True)),
            captured=captured(star),
            error=max(errors),
            same=[a.token_ids == b.token_ids for a, b in zip(sliced, whole, strict=False)],
        )


def captured(star: StarLLM) -> bool:
    """True if forwards in slices run as CUDA graphs."""
    graphs = star.runtime.handle.graphs
    return graphs is not None and any(
        works for (*_, parts), works in graphs.captured.items() if parts
    )


def error_of(reply: Generation, expected: Generation) -> float:
    """Return the relative error of logits, up to the first token that differs."""
    if reply.logits is None or expected.logits is None:
        # Rank 0 has the logits.
        return 0.0
    pairs = zip(reply.token_ids, expected.token_ids, strict=True)
    steps = 1 + len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    error = (reply.logits[:steps] - expected.logits[:steps]).abs().max()
    return float(error / expected.logits.abs().max())


def median_ms(star: StarLLM, context: Any, query: Any, tokens: int) -> float:
    """Return the milliseconds of a call that generates so many tokens."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        star.generate(context, query, max_new_tokens=tokens, ignore_eos=True)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[1]


def measure(tokens: int) -> None:
    """Time a token of an answer with weights whole, and in slices of some and of all parts."""
    model = load_model(None, "llama-3.1-8b", dtype="bfloat16", device="auto")
    star = StarLLM(model, block_size=16384)
    context = star.encode(random_ids(model, tokens))
    query = random_ids(model, QUERY_TOKENS, seed=3)
    rule = slices.SAVED_BYTES
    for name, saved_bytes in (("whole", 2**60), ("by rule", rule), ("all", 0)):
        slices.SAVED_BYTES = saved_bytes
        before = torch.cuda.memory_allocated()
        first_ms = median_ms(star, context, query, 1)
        step_ms = (median_ms(star, context, query, TOKENS) - first_ms) / (TOKENS - 1)
        say(
            star,
            context=tokens,
            slices=name,
            parts=list(slices.choose(star.runtime.handle, star.runtime.comm, None)),
            first_ms=round(first_ms, 2),
            step_ms=round(step_ms, 3),
            memory_mb=round((torch.cuda.memory_allocated() - before) / 2**20, 1),
        )
    slices.SAVED_BYTES = rule


def main() -> None:
    task, *arguments = sys.argv[1:]
    if task == "check":
        for dtype in ("float32", "bfloat16"):
            check(dtype)
    else:
        for tokens in arguments:
            measure(int(tokens))


if __name__ == "__main__":
    main()
