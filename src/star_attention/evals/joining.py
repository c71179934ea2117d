"""Folders of runs that differ in their samples or variants alone, joined into one.

Parts that ran beside each other, on several GPUs or machines, are reported on as one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals import run_folder
from star_attention.evals.run_folder import Prediction


def join(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write to a new folder all that the folders hold, in their order. It is a run like any other, and can be added to.

    A prediction that two of them have is taken once.

    Raises `InvalidInputError` for a folder that holds no run or a damaged one, for settings or prose that differ (named), for a
    sample or an answer that is not the same in two of them, and where `out` holds a run already.
    """
    out = Path(out)
    if (out / run_folder.RUN).exists():
        raise InvalidInputError(f"{out} holds a run already; give a new folder with --out")
    parts = [(Path(folder), run_folder.read_run(Path(folder))) for folder in folders]
    first, run = parts[0]
    for folder, other in parts[1:]:
        run_folder.check_same(folder, run, other["settings"])
        run = _joined(run, other, (first, folder))
    predictions = _predictions([folder for folder, _ in parts])
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(prediction)) + "\n" for prediction in predictions)
    (out / run_folder.PREDICTIONS).write_text(lines, encoding="utf-8")
    run_folder.write_json(out, run)


def _joined(run: Mapping[str, Any], other: Mapping[str, Any], folders: tuple[Path, Path]) -> dict[str, Any]:
    for name, digest in other["prose"].items():
        if run["prose"].get(name, digest) != digest:
            raise InvalidInputError(
                f"{folders[1]} was made with another {name} ({digest}) than {folders[0]} ({run['prose'][name]}), so that their"
                " samples differ; report on each by itself"
            )
    variants = dict(run["variants"])
    for key, told in other["variants"].items():
        mine = variants.get(key, {"plans": [], "cells": []})
        variants[key] = told | {
            "plans": [*mine["plans"], *(plan for plan in told["plans"] if plan not in mine["plans"])],
            "cells": _cells([*mine["cells"], *told["cells"]]),
        }
    skipped = {one["sample"]: one for one in [*run["skipped"], *other["skipped"]]}
    return {
        **run,
        "cells": _cells([*run["cells"], *other["cells"]]),
        "variants": variants,
        "skipped": list(skipped.values()),
        "left_out": run["left_out"] | other["left_out"],
        "prose": run["prose"] | other["prose"],
        "sessions": [*run["sessions"], *other["sessions"]],
    }


def _cells(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each task and length the largest number of samples."""
    counts: dict[tuple[str, int], int] = {}
    for cell in cells:
        at = cell["task"], cell["length"]
        counts[at] = max(counts.get(at, 0), cell["samples"])
    return [{"task": task, "length": length, "samples": count} for (task, length), count in counts.items()]


def _predictions(folders: Iterable[Path]) -> list[Prediction]:
    found: dict[tuple[str, str], tuple[Path, Prediction]] = {}
    samples: dict[str, tuple[Path, str]] = {}
    for folder in folders:
        for one in run_folder.read_predictions(folder):
            before, digest = samples.setdefault(one.sample, (folder, one.sample_sha256))
            if digest != one.sample_sha256:
                raise InvalidInputError(
                    f"sample {one.sample} of {folder} is not that of {before}; report on each by itself"
                )
            before, same = found.setdefault(one.key, (folder, one))
            if same.prediction != one.prediction:
                raise InvalidInputError(
                    f"{before} and {folder} answer sample {one.sample}, variant {one.variant}, differently; leave one of them out"
                )
    return [prediction for _, prediction in found.values()]
