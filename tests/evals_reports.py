"""Runs as `runner.run` writes them, with scores by rule, for the tests of `evals.reports`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from star_attention.evals.reports import report
from star_attention.evals.runs.predictions import PREDICTIONS, Prediction
from star_attention.evals.runs.record import cell_list
from star_attention.evals.runs.run_folder import FORMAT, MARKDOWN, METRICS, RUN
from star_attention.evals.runs.variants import parse

TASKS = {"niah": "retrieval", "vt": "multi-hop", "cwe": "aggregation"}
"""Tasks and their groups."""

Score = Callable[[str, str, int, int], float]
"""The score by task, variant, length and index of the sample."""


def random_score(probability: float) -> Score:
    """Right with this probability; dense attention always is."""

    def score(task: str, variant: str, length: int, index: int) -> float:
        is_right = random.Random(f"{task} {variant} {length} {index}").random() < probability
        return 1.0 if variant == "dense" or is_right else 0.0

    return score


def make_run(
    folder: Path,
    variants: str = "dense,star:/4",
    *,
    lengths: Sequence[int] = (1024, 2048),
    count: int = 8,
    score: Score | None = None,
    meta: Callable[[int], dict[str, Any]] = lambda index: {},
    tasks: Mapping[str, str] = TASKS,
    change: Callable[[Prediction], Prediction | None] = lambda prediction: prediction,
) -> Path:
    """Write run.json and predictions.jsonl to a folder.

    Args:
        folder: The folder, made if needed.
        variants: Keys, separated by commas.
        lengths: Lengths of the samples.
        count: Samples of each task and length.
        score: Scores of the predictions; by default `random_score(0.4)`.
        meta: `meta` of a sample by its index.
        tasks: Tasks and their groups.
        change: Changes a prediction, or drops it (None).
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = variants.split(",")
    score = score or random_score(0.4)
    lines = []
    for task, length, index, key in product(tasks, lengths, range(count), keys):
        changed = change(
            prediction(
                f"{task}-{length}-{index}",
                key,
                task=task,
                group=tasks[task],
                length=length,
                score=score(task, key, length, index),
                meta=meta(index),
            )
        )
        lines += [] if changed is None else [changed.to_json()]
    (folder / PREDICTIONS).write_text("".join(lines))
    cells = cell_list(dict.fromkeys(product(tasks, lengths), count))
    (folder / RUN).write_text(json.dumps(run_record(keys, cells)))
    return folder


def prediction(
    sample: str,
    variant: str,
    *,
    task: str,
    group: str,
    length: int,
    score: float,
    meta: dict[str, Any],
) -> Prediction:
    """A prediction with the sizes of its variant, and twice the time for dense attention."""
    block_size, anchor_size = parse(variant).sizes(length)
    block_size = block_size or length or 1
    return Prediction(
        sample=sample,
        variant=variant,
        settings="abc",
        task=task,
        group=group,
        length=length,
        sample_sha256="0",
        context_sha256=sample,
        prediction="an answer",
        answers=("an answer",),
        metric="string_match_all",
        score=score,
        finish_reason="stop",
        context_tokens=length,
        query_tokens=9,
        answer_tokens=3,
        block_size=block_size,
        anchor_size=block_size if anchor_size is None else anchor_size,
        blocks=-(-length // block_size),
        encode_s=length / 1000 * (2 if variant == "dense" else 1),
        sharing=2,
        answer_s=0.25,
        peak_bytes=None,
        meta=meta,
    )


def run_record(keys: Sequence[str], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "format": FORMAT,
        "settings": {
            "suite": "ruler",
            "options": {"essays": "a|b"},
            "seed": 0,
            "chat": False,
            "max_new_tokens": None,
            "reserve_tokens": 64,
            "decoding": "greedy",
            "versions": {"torch": "1"},
            "model": {"dtype": "torch.float32", "weights": "w" * 64, "tokenizer": "t" * 64},
        },
        "settings_sha256": "abc",
        "cells": cells,
        "variants": {key: {"name": parse(key).name, "plans": [], "cells": cells} for key in keys},
        "skipped": [],
        "left_out": {},
        "prose": {"essays": "1234"},
        "sessions": [
            {
                "date": "d",
                "command": "c",
                "model": "m",
                "hardware": "h",
                "ranks": 1,
                "git": None,
                "options": {"squad": "s"},
                "answers": 1,
            }
        ],
    }


def metrics_of(folder: Path) -> dict[str, Any]:
    """metrics.json of the reports, which are written first."""
    report.write(folder)
    metrics: dict[str, Any] = json.loads((folder / METRICS).read_text())
    return metrics


def report_of(folder: Path) -> str:
    """report.md, which is written first."""
    report.write(folder)
    return (folder / MARKDOWN).read_text()


def only_dense_has_vt(prediction: Prediction) -> Prediction | None:
    """A `change` that leaves no cell with both dense attention and another variant."""
    is_dense, is_vt = prediction.variant == "dense", prediction.task == "vt"
    return prediction if is_dense == is_vt else None
