"""Joining run folders that differ only in their samples or variants.

Parts that ran side by side, on several GPUs or machines, are then reported as one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals.runs import run_folder
from star_attention.evals.runs.predictions import PREDICTIONS, Prediction, read_predictions
from star_attention.evals.runs.record import Cell, cell_counts, cell_list


def join(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write the content of several run folders to a new one, in their order.

    The result is a run like any other, and may be added to. A prediction that two folders hold is
    written once.

    Args:
        folders: The parts.
        out: A folder without a run.

    Raises:
        InvalidInputError: For a missing or damaged run; for settings or prose that differ (naming
            what); for a sample or an answer that differs between folders; for an incomplete part if
            another one has samples of the same task and length, since the total is unknown then;
            and if `out` holds a run, or files that would be overwritten.
    """
    out = Path(out)
    if (out / run_folder.RUN).exists():
        raise InvalidInputError(f"{out} already holds a run; give a new folder with --out")
    run_folder.check_output(out)
    parts = [
        _Part(folder=Path(folder), run=run_folder.read_run(Path(folder))) for folder in folders
    ]
    _check_same_settings(parts)
    predictions = _joined_predictions(parts)
    run = _joined_run(parts)
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(prediction.to_json() for prediction in predictions)
    (out / PREDICTIONS).write_text(lines, encoding="utf-8")
    run_folder.write_run(out, run)


@dataclass(frozen=True, kw_only=True)
class _Part:
    folder: Path
    run: Mapping[str, Any]

    @cached_property
    def predictions(self) -> list[Prediction]:
        return list(read_predictions(self.folder))

    def expected(self, variant: str | None) -> dict[Cell, int]:
        """Number of samples of each cell, of one variant or of the whole part."""
        if variant is None:
            return cell_counts(self.run["cells"])
        return cell_counts(self.run["variants"].get(variant, {"cells": []})["cells"])

    def answered(self, variant: str | None) -> dict[Cell, set[str]]:
        """Ids of the samples of each cell that have a prediction."""
        samples: dict[Cell, set[str]] = {}
        for prediction in self.predictions:
            if variant in (None, prediction.variant):
                cell = (prediction.task, prediction.length)
                samples.setdefault(cell, set()).add(prediction.sample)
        return samples


def _check_same_settings(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        differing = run_folder.difference(first.run["settings"], part.run["settings"])
        if differing is not None:
            name, expected, actual = differing
            raise InvalidInputError(
                f"{part.folder} was made with another {name} ({actual}) than {first.folder}"
                f" ({expected}); report on each separately"
            )


def _joined_run(parts: Sequence[_Part]) -> dict[str, Any]:
    variants: dict[str, dict[str, Any]] = {}
    for part in parts:
        for key, variant in part.run["variants"].items():
            plans = variants.setdefault(key, variant | {"plans": []})["plans"]
            plans += [plan for plan in variant["plans"] if plan not in plans]
    runs = [part.run for part in parts]
    skipped = {line["sample"]: line for run in runs for line in run["skipped"]}
    return {
        **runs[0],
        "cells": _joined_cells(parts, None),
        "variants": {
            key: variant | {"cells": _joined_cells(parts, key)} for key, variant in variants.items()
        },
        "skipped": list(skipped.values()),
        "left_out": {name: reason for run in runs for name, reason in run["left_out"].items()},
        "prose": _joined_prose(parts),
        "sessions": [session for run in runs for session in run["sessions"]],
    }


def _joined_prose(parts: Sequence[_Part]) -> dict[str, str]:
    prose: dict[str, tuple[Path, str]] = {}
    for part in parts:
        for name, digest in part.run["prose"].items():
            folder, expected = prose.setdefault(name, (part.folder, digest))
            if expected != digest:
                raise InvalidInputError(
                    f"{part.folder} was made with another {name} ({digest}) than {folder}"
                    f" ({expected}), so their samples differ; report on each separately"
                )
    return {name: digest for name, (_, digest) in prose.items()}


def _joined_cells(parts: Sequence[_Part], variant: str | None) -> list[dict[str, Any]]:
    """Count the samples of each cell; if several parts have it, of the samples in any of them."""
    counts: dict[Cell, int] = {}
    for cell in dict.fromkeys(cell for part in parts for cell in part.expected(variant)):
        sharing = [part for part in parts if cell in part.expected(variant)]
        if len(sharing) == 1:
            counts[cell] = sharing[0].expected(variant)[cell]
            continue
        for part in sharing:
            _check_complete(part, variant, cell)
        counts[cell] = len(set().union(*(part.answered(variant)[cell] for part in sharing)))
    return cell_list(counts)


def _check_complete(part: _Part, variant: str | None, cell: Cell) -> None:
    answered = len(part.answered(variant).get(cell, ()))
    expected = part.expected(variant)[cell]
    if answered < expected:
        task, length = cell
        raise InvalidInputError(
            f"{part.folder} has {answered:,} of {expected:,} samples of {task} at {length:,}"
            " tokens, of which other folders have samples too; run its command again first"
        )


def _joined_predictions(parts: Sequence[_Part]) -> list[Prediction]:
    predictions: dict[tuple[str, str], tuple[Path, Prediction]] = {}
    samples: dict[str, tuple[Path, str]] = {}
    for part in parts:
        for prediction in part.predictions:
            folder, digest = samples.setdefault(
                prediction.sample, (part.folder, prediction.sample_sha256)
            )
            if digest != prediction.sample_sha256:
                raise InvalidInputError(
                    f"sample {prediction.sample} of {part.folder} differs from that of {folder};"
                    " report on each separately"
                )
            folder, first = predictions.setdefault(prediction.key, (part.folder, prediction))
            if first.prediction != prediction.prediction:
                raise InvalidInputError(
                    f"{folder} and {part.folder} answer sample {prediction.sample}, variant"
                    f" {prediction.variant}, differently; leave one of them out"
                )
    return [prediction for _, prediction in predictions.values()]
