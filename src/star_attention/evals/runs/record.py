"""The content of run.json: the record of one session, merged into that of earlier ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from star_attention.evals.runs.predictions import Prediction
from star_attention.evals.runs.run_folder import FORMAT
from star_attention.evals.samples.sample import Sample

Cell = tuple[str, int]
"""A task and a length."""


def cell_counts(cells: Iterable[Mapping[str, Any]]) -> dict[Cell, int]:
    """Return the number of samples of each cell, as run.json lists them."""
    return {(cell["task"], cell["length"]): cell["samples"] for cell in cells}


def cell_list(counts: Mapping[Cell, int]) -> list[dict[str, Any]]:
    """Return cells as run.json lists them."""
    return [
        {"task": task, "length": length, "samples": count}
        for (task, length), count in counts.items()
    ]


def cells_of_variant(
    variant: str, samples: Iterable[Sample], predictions: Iterable[Prediction]
) -> list[dict[str, Any]]:
    """Return the number of samples that a variant has to answer, and has answered, by cell."""
    answered = {
        prediction.sample: (prediction.task, prediction.length)
        for prediction in predictions
        if prediction.variant == variant
    }
    cells = [*answered.values()]
    cells += [(sample.task, sample.length) for sample in samples if sample.id not in answered]
    return cell_list(Counter(cells))


def session_record(
    samples: Sequence[Sample],
    *,
    settings: Mapping[str, Any],
    settings_sha256: str,
    variants: Mapping[str, Mapping[str, Any]],
    skipped: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str],
    session: Mapping[str, Any],
) -> dict[str, Any]:
    """Return run.json of one session alone.

    Args:
        samples: All samples, with those that are too long.
        settings: The settings that answers depend on.
        settings_sha256: Their hash.
        variants: Name, resolved block plans and cells, by key.
        skipped: Samples that are too long.
        left_out: Samples that were not made, with the reasons.
        session: Date, command, hardware and the like.
    """
    return {
        "format": FORMAT,
        "settings": settings,
        "settings_sha256": settings_sha256,
        "cells": cell_list(Counter((sample.task, sample.length) for sample in samples)),
        "variants": {key: dict(variant) for key, variant in variants.items()},
        "skipped": list(skipped),
        "left_out": dict(left_out),
        "prose": {
            str(sample.meta["prose"]): str(sample.meta["prose_sha256"])
            for sample in samples
            if "prose_sha256" in sample.meta
        },
        "sessions": [session],
    }


def merged(earlier: Mapping[str, Any] | None, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return run.json of all sessions: that of earlier ones, and that of this one."""
    if earlier is None:
        return dict(run)
    variants = {key: dict(variant) for key, variant in earlier["variants"].items()}
    for key, variant in run["variants"].items():
        known = variants.setdefault(key, variant)
        plans = known["plans"] + [plan for plan in variant["plans"] if plan not in known["plans"]]
        cells = _larger(known["cells"], variant["cells"])
        variants[key] = known | {"plans": plans, "cells": cells}
    skipped = {line["sample"]: line for line in [*earlier["skipped"], *run["skipped"]]}
    return {
        **run,
        "cells": _larger(earlier["cells"], run["cells"]),
        "variants": variants,
        "skipped": list(skipped.values()),
        "left_out": earlier["left_out"] | run["left_out"],
        "prose": earlier["prose"] | run["prose"],
        "sessions": [*earlier["sessions"], *run["sessions"]],
    }


def _larger(
    earlier: Iterable[Mapping[str, Any]], added: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the cells with the larger of both counts."""
    counts = Counter(cell_counts(earlier))
    counts |= Counter(cell_counts(added))
    return cell_list(counts)
