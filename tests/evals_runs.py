"""Small runs for the tests of `evals.runs`: a random model, a few samples, two variants."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from star_attention import StarLLM
from star_attention.evals.runs import runner
from star_attention.evals.runs.predictions import PREDICTIONS
from star_attention.evals.runs.runner import RunSummary
from star_attention.evals.runs.settings import RunSettings
from star_attention.evals.runs.variants import Variant, parse_all
from star_attention.evals.samples.sample import Sample
from tests.engines import bundled_tokenizer, text_model

VARIANTS = parse_all("dense,star:/4")


def engine() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer())


def samples(count: int = 4, *, sharing: int = 1, task: str = "needles") -> list[Sample]:
    """`sharing` questions in a row have one context."""
    return [
        Sample(
            id=f"{task}-{i}",
            task=task,
            length=256,
            context="".join(
                f"The number of box {line} is {line * 37 + i // sharing}.\n" for line in range(12)
            ),
            query=f"What is the number of box {i % 12}?",
            answer_prefix=" It is",
            answers=(str(i),),
            max_new_tokens=3,
            metric="string_match_all",
            meta={"category": "retrieval"},
        )
        for i in range(count)
    ]


def run(
    star: StarLLM,
    samples: Sequence[Sample],
    variants: Sequence[Variant],
    out: Path,
    *,
    rows: int = 1,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> RunSummary:
    """`runner.run`, with the fields of `RunSettings` as keywords."""
    return runner.run(
        star, samples, variants, out, RunSettings(**settings), rows=rows, progress=progress
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl."""
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]
