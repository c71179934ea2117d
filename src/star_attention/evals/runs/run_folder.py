"""The folder of a run: the names of its files, run.json, and checks before a run resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals.runs.predictions import Prediction, sample_sha256
from star_attention.evals.samples.sample import Sample

RUN = "run.json"
METRICS = "metrics.json"
SUMMARY = "summary.csv"
MARKDOWN = "report.md"
PAGE = "report.html"
FIGURES = "pictures"

FORMAT = 3

_KEYS = (
    "settings",
    "settings_sha256",
    "cells",
    "variants",
    "skipped",
    "left_out",
    "prose",
    "sessions",
)
"""Fields of run.json other than its format."""


def check_output(out: Path) -> None:
    """Check that a run may be written to a folder.

    Raises:
        InvalidInputError: If the path cannot become a folder, or holds no run but files that the
            reports of one would overwrite.
    """
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InvalidInputError(f"{out} is not a folder; give another one with --out")
    reports = (METRICS, SUMMARY, MARKDOWN, PAGE, FIGURES)
    existing = [name for name in reports if (out / name).exists()]
    if existing and not (out / RUN).exists():
        raise InvalidInputError(
            f"{out} holds no run, but {', '.join(existing)}, which the reports would overwrite;"
            " give a new folder with --out"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of run.json.

    Raises:
        InvalidInputError: If it is missing or damaged.
    """
    run = find_run(folder)
    if run is None:
        raise InvalidInputError(
            f"{folder} holds no {RUN}; give a folder that `eval` has written with --out"
        )
    return run


def find_run(folder: Path) -> dict[str, Any] | None:
    """Return the content of run.json, or None if there is no such file.

    Raises:
        InvalidInputError: If it is damaged, or of another format.
    """
    path = folder / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["format"] != FORMAT:
            raise InvalidInputError(
                f"{path} has format {run['format']}, but this version reads {FORMAT}"
            )
        missing = [name for name in _KEYS if name not in run]
        if not missing:
            required = ("suite", "options", "model")
            missing = [name for name in required if name not in run["settings"]]
        if missing:
            raise InvalidInputError(
                f"{path} is damaged ({', '.join(missing)} missing); give another folder"
            )
        return dict(run)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InvalidInputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} is damaged ({error}); give another folder") from None


def write_run(out: Path, run: Mapping[str, Any]) -> None:
    """Write run.json atomically: a kill leaves the old file."""
    part = out / (RUN + ".part")
    part.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    part.replace(out / RUN)


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the first setting that differs, or that only one side has.

    Returns:
        Its name and both values; None if the settings are the same.
    """
    # Imports torch, which a command line does not need to be checked.
    from star_attention.hf.loading import identity

    for left, right in ((first, second), (first["model"], second["model"])):
        left, right = (
            {name: value for name, value in side.items() if name != "model"}
            for side in (left, right)
        )
        differing = identity.difference(left, right)
        if differing is None:
            # `identity.difference` goes through the fields of its first argument only.
            swapped = identity.difference(right, left)
            differing = None if swapped is None else (swapped[0], swapped[2], swapped[1])
        if differing is not None:
            name, *values = differing
            left_value, right_value = (
                "not given" if value == "None" else value for value in values
            )
            return name, left_value, right_value
    return None


def check_same_settings(out: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse settings that differ from the earlier run's: `InvalidInputError` names the first."""
    differing = difference(earlier["settings"], plain(settings))
    if differing is not None:
        name, earlier_value, value = differing
        raise InvalidInputError(
            f"{out} holds a run with another {name} ({earlier_value} there, {value} here);"
            " give another folder with --out, or the same settings"
        )


def check_predictions(
    out: Path, predictions: Sequence[Prediction], samples: Sequence[Sample], digest: str
) -> None:
    """Check that earlier predictions have these settings and come from these samples.

    Raises:
        InvalidInputError: Naming what differs.
    """
    by_id = {sample.id: sample for sample in samples}
    for prediction in predictions:
        if prediction.settings != digest:
            raise InvalidInputError(
                f"{out} holds predictions with other settings ({prediction.settings} there,"
                f" {digest} here); give another folder"
            )
        sample = by_id.get(prediction.sample)
        if sample is None or prediction.sample_sha256 == sample_sha256(sample):
            continue
        earlier, current = (meta.get("prose_sha256") for meta in (prediction.meta, sample.meta))
        differing = "text or answers"
        if earlier != current:
            differing = f"prose ({earlier} there, {current} here)"
        raise InvalidInputError(
            f"{out} holds a run in which sample {sample.id} has another {differing}; give another"
            " folder"
        )


def plain(value: Any) -> Any:
    """Return the value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))
