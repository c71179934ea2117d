"""Folders of runs that differ in their samples or variants alone, joined into one.

Parts that ran beside each other, on several GPUs or machines, are reported on as one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals.runs import run_folder
from star_attention.evals.runs.run_folder import Prediction


def join(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write to a new folder all that the folders hold, in their order. It is a run like any other, and can be added to.

    A prediction that two of them have is taken once.

    Raises `InvalidInputError` for a folder that holds no run or a damaged one, for settings or prose that differ (named), for a
    sample or an answer that is not the same in two of them, for a part that is not complete where another has samples of the same
    task and length (how many there are in all could not be told), and where `out` holds a run already, or files that would be
    replaced.
    """
    out = Path(out)
    if (out / run_folder.RUN).exists():
        raise InvalidInputError(f"{out} holds a run already; give a new folder with --out")
    run_folder.check_place(out)
    parts = [
        _Part(folder=Path(folder), run=run_folder.read_run(Path(folder))) for folder in folders
    ]
    first = parts[0]
    for part in parts[1:]:
        field = run_folder.differing(first.run["settings"], part.run["settings"])
        if field is not None:
            name, ours, theirs = field
            raise InvalidInputError(
                f"{part.folder} was made with another {name} ({theirs}) than {first.folder} ({ours}); report on each by itself"
            )
    predictions = _predictions(parts)
    run = _joined(parts)
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(prediction)) + "\n" for prediction in predictions)
    (out / run_folder.PREDICTIONS).write_text(lines, encoding="utf-8")
    run_folder.write_json(out, run)


_Cell = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class _Part:
    folder: Path
    run: Mapping[str, Any]

    @cached_property
    def predictions(self) -> list[Prediction]:
        return list(run_folder.read_predictions(self.folder))

    def expected(self, variant: str | None) -> dict[_Cell, int]:
        """How many samples each task and length has, under a variant or at all."""
        told = self.run if variant is None else self.run["variants"].get(variant, {"cells": []})
        return {(cell["task"], cell["length"]): cell["samples"] for cell in told["cells"]}

    def made(self, variant: str | None) -> dict[_Cell, set[str]]:
        """The samples that are there."""
        found: dict[_Cell, set[str]] = {}
        for one in self.predictions:
            if variant in (None, one.variant):
                found.setdefault((one.task, one.length), set()).add(one.sample)
        return found


def _joined(parts: Sequence[_Part]) -> dict[str, Any]:
    prose: dict[str, tuple[Path, str]] = {}
    variants: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, digest in part.run["prose"].items():
            before, known = prose.setdefault(name, (part.folder, digest))
            if known != digest:
                raise InvalidInputError(
                    f"{part.folder} was made with another {name} ({digest}) than {before} ({known}), so that their samples differ;"
                    " report on each by itself"
                )
        for key, told in part.run["variants"].items():
            plans = variants.setdefault(key, told | {"plans": []})["plans"]
            plans += [plan for plan in told["plans"] if plan not in plans]
    runs = [part.run for part in parts]
    return {
        **runs[0],
        "cells": _cells(parts, None),
        "variants": {key: told | {"cells": _cells(parts, key)} for key, told in variants.items()},
        "skipped": list({one["sample"]: one for run in runs for one in run["skipped"]}.values()),
        "left_out": {name: why for run in runs for name, why in run["left_out"].items()},
        "prose": {name: digest for name, (_, digest) in prose.items()},
        "sessions": [session for run in runs for session in run["sessions"]],
    }


def _cells(parts: Sequence[_Part], variant: str | None) -> list[dict[str, Any]]:
    """Of each task and length the number of samples: where several parts have it, of those that they have together."""
    counts: dict[_Cell, int] = {}
    for cell in dict.fromkeys(cell for part in parts for cell in part.expected(variant)):
        having = [part for part in parts if cell in part.expected(variant)]
        counts[cell] = having[0].expected(variant)[cell]
        if len(having) == 1:
            continue
        for part in having:
            made, expected = len(part.made(variant).get(cell, ())), part.expected(variant)[cell]
            if made < expected:
                raise InvalidInputError(
                    f"{part.folder} has {made:,} of {expected:,} samples of {cell[0]} at {cell[1]:,} tokens, of which other folders"
                    " have samples too; run its command again first"
                )
        counts[cell] = len(set().union(*(part.made(variant)[cell] for part in having)))
    return [
        {"task": task, "length": length, "samples": count}
        for (task, length), count in counts.items()
    ]


def _predictions(parts: Iterable[_Part]) -> list[Prediction]:
    found: dict[tuple[str, str], tuple[Path, Prediction]] = {}
    samples: dict[str, tuple[Path, str]] = {}
    for part in parts:
        for one in part.predictions:
            before, digest = samples.setdefault(one.sample, (part.folder, one.sample_sha256))
            if digest != one.sample_sha256:
                raise InvalidInputError(
                    f"sample {one.sample} of {part.folder} is not that of {before}; report on each by itself"
                )
            before, same = found.setdefault(one.key, (part.folder, one))
            if same.prediction != one.prediction:
                raise InvalidInputError(
                    f"{before} and {part.folder} answer sample {one.sample}, variant {one.variant}, differently; leave one of them"
                    " out"
                )
    return [prediction for _, prediction in found.values()]
