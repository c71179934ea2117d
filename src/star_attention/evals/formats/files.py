"""Reading and writing data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.formats.babilong import BABILONG
from star_attention.evals.formats.format import Format
from star_attention.evals.formats.infinitebench import INFINITEBENCH
from star_attention.evals.formats.own import SAMPLES
from star_attention.evals.formats.prompts import KVPRESS, RULER_PROMPTS, STAR_ATTENTION
from star_attention.evals.formats.questions import QUESTIONS, parts_of
from star_attention.evals.formats.row import Row
from star_attention.evals.formats.scbench import SCBENCH
from star_attention.evals.formats.tables import read_rows, write_rows
from star_attention.evals.metrics.checks import check, check_characters
from star_attention.evals.samples.sample import Sample

FORMATS = {
    format.name: format
    for format in (
        SAMPLES,
        STAR_ATTENTION,
        SCBENCH,
        KVPRESS,
        BABILONG,
        INFINITEBENCH,
        QUESTIONS,
        RULER_PROMPTS,
    )
}
"""Formats by name, in the order in which their fields are compared with a file's."""
WRITTEN = tuple(name for name, format in FORMATS.items() if format.write is not None)


def read(
    path: str | Path, *, format: str | None = None, prompts: str | None = None
) -> list[Sample]:
    """Read the samples of a file, in its order.

    Args:
        path: The file.
        format: Name in `FORMATS`; None to recognize it by the fields of the first row.
        prompts: Path of BABILong's published prompts, for its rows; None for our own.

    Raises:
        InvalidInputError: The file is missing, malformed, empty or of an unknown format; two
            samples have the same id; or there are prompts for a format without any. The message
            names file and line.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise InvalidInputError(
            f"format {quote(format)} is unknown; choose one of {', '.join(FORMATS)}"
        )
    reader = None if format is None else FORMATS[format]
    samples: list[Sample] = []
    places: dict[str, str] = {}
    for index, (place, values) in enumerate(read_rows(path)):
        try:
            reader = reader or _recognize(values)
            row = Row(values=values, path=path, index=index, prompts=prompts)
            for sample in _read_row(reader, row):
                if sample.id in places:
                    raise InvalidInputError(
                        f"id {quote(sample.id)} is already that of {places[sample.id]};"
                        " make ids unique"
                    )
                places[sample.id] = place
                samples.append(sample)
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}, {place}: {error}") from None
    if not samples:
        raise InvalidInputError(f"{path} contains no samples; check that it is the right file")
    return samples


def _read_row(reader: Format, row: Row) -> list[Sample]:
    """Return the samples of a row, which can be answered and scored."""
    if row.prompts is not None and reader is not BABILONG:
        raise InvalidInputError(
            f"prompts are for BABILong's files, not for format {reader.name}; leave them out"
        )
    missing = reader.missing(row.values)
    if missing:
        raise InvalidInputError(
            f"fields {', '.join(missing)} of format {reader.name} are missing; check the"
            " file, or give another format"
        )
    samples = reader.read(row)
    for sample in samples:
        try:
            check_characters(sample.as_dict())
        except InvalidInputError:
            # The file may have another name for the field.
            check_characters(row.values)
            raise
        check(sample)
    return samples


def _recognize(values: Mapping[str, Any]) -> Format:
    for format in FORMATS.values():
        if not format.missing(values):
            return format
    parts = parts_of(values)
    if "query" in parts and "answers" in parts:
        raise InvalidInputError(
            f"fields {quote(list(values))} have a prompt ({parts['query']}) and answers"
            f" ({parts['answers']}), but no text that is encoded before it; split the prompt, and"
            " give its long part as context and its question as query"
        )
    known = "; ".join(f"{name} has {', '.join(format.fields)}" for name, format in FORMATS.items())
    raise InvalidInputError(
        f"fields {', '.join(map(str, values))} do not match any known format: {known}"
    )


def read_all(
    paths: Sequence[str | Path], *, format: str | None = None, prompts: str | None = None
) -> list[Sample]:
    """Read the samples of several files.

    If a file has an id that an earlier file has, its ids are preceded by as many folder names as it
    takes to make them unique; by its own name if the earlier files are in the same folder.

    Args:
        paths: The files.
        format: As for `read`.
        prompts: As for `read`.

    Raises:
        InvalidInputError: As for `read`, or a file is named twice.
    """
    samples: list[Sample] = []
    earlier: list[Path] = []
    ids: set[str] = set()
    for path in map(Path, paths):
        if path.resolve() in earlier:
            raise InvalidInputError(f"{path} is named twice; give it once")
        own = read(path, format=format, prompts=prompts)
        if any(sample.id in ids for sample in own):
            name = _distinguishing_name(path, earlier)
            own = [replace(sample, id=f"{name}/{sample.id}") for sample in own]
        earlier.append(path.resolve())
        ids.update(sample.id for sample in own)
        samples += own
    return samples


def _distinguishing_name(path: Path, earlier: Sequence[Path]) -> str:
    """Return the shortest trailing part of the file's folder that no earlier folder ends with."""
    parts = path.resolve().parent.parts
    for count in range(1, len(parts) + 1):
        tail = parts[-count:]
        if not any(other.parent.parts[-count:] == tail for other in earlier):
            return Path(*tail).as_posix()
    return path.name


def write(path: str | Path, samples: Iterable[Sample], *, format: str) -> None:
    """Write samples to a file, overwriting an existing one.

    Args:
        path: The file; its suffix says how rows are written.
        samples: The samples.
        format: Name in `WRITTEN`.

    Raises:
        InvalidInputError: The format or suffix cannot be written; or a sample could not be read
            again: in format ruler, one whose query is not a question of RULER's.
    """
    path = Path(path)
    writer = FORMATS[format].write if format in FORMATS else None
    if writer is None:
        raise InvalidInputError(
            f"format {quote(format)} cannot be written; choose one of {', '.join(WRITTEN)}"
        )
    suffixes = FORMATS[format].suffixes
    if path.suffix not in suffixes:
        raise InvalidInputError(
            f"{path} cannot hold format {format}; name a file ending in {' or '.join(suffixes)}"
        )
    write_rows(path, [writer(sample, index) for index, sample in enumerate(samples)])
