"""`bench plot`: the pictures of earlier measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from star_attention.bench import decode_plots
from star_attention.bench.decode_rows import DecodeRow
from star_attention.bench.prefill import plots
from star_attention.bench.prefill.rows import PrefillRow
from star_attention.errors import InvalidInputError
from star_attention.tools import machine
from star_attention.tools.plotting import require_matplotlib

_ROW_TYPES: dict[str, Callable[..., Any]] = {"prefill": PrefillRow, "decode": DecodeRow}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The contents of one JSON file. Rows with the same `subject` can share a picture."""

    path: Path
    kind: str
    subject: tuple[str, str, str]
    rows: list[Any]
    flops_per_s: float


def draw_files(files: list[Path], folder: Path) -> list[Path]:
    """Draw what benchmarks have written, the rows of one benchmark together.

    Args:
        files: JSON of `bench prefill` and `bench decode`.
        folder: created if it is missing.

    Returns:
        The files written.

    Raises:
        InvalidInputError: a file that is not such JSON, or files of one benchmark on several
            machines or models.
        MissingPackageError: matplotlib is not installed.
    """
    require_matplotlib()
    groups: dict[str, list[Measurement]] = {kind: [] for kind in _ROW_TYPES}
    for path in files:
        measurement = _read(path)
        group = groups[measurement.kind]
        if group and group[0].subject != measurement.subject:
            raise InvalidInputError(
                f"{group[0].path} and {path} differ: {group[0].subject} and"
                f" {measurement.subject}; draw them separately"
            )
        group.append(measurement)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if prefills := groups["prefill"]:
        flops_per_s = median(measurement.flops_per_s for measurement in prefills)
        written += plots.draw(_rows(prefills), flops_per_s, folder)
    if decodes := groups["decode"]:
        written += decode_plots.draw(_rows(decodes), folder)
    return written


def _read(path: Path) -> Measurement:
    record = machine.read_record(path, *_ROW_TYPES)
    kind = record["benchmark"]
    try:
        return Measurement(
            path=path,
            kind=kind,
            subject=(record["model"], record["dtype"], record["hardware"]),
            rows=[_ROW_TYPES[kind](**row) for row in record["rows"]],
            flops_per_s=float(record["ceilings"]["flops_per_s"]),
        )
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError(
            f"{path} is not JSON of `bench {kind}` as this version writes it; measure again"
        ) from None


def _rows(measurements: list[Measurement]) -> list[Any]:
    return [row for measurement in measurements for row in measurement.rows]
