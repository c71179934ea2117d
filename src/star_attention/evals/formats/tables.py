"""Rows of .jsonl, .json, .csv and .parquet files."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, TextError, quote, quote_path
from star_attention.files import text as text_files

_BYTE_ORDER_MARK = "\ufeff"

NumberedRow = tuple[str, dict[str, Any]]
"""Where a row is, for messages ("line 3"), and its fields."""


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Read the rows of a file, in the format of its suffix (.jsonl for any other).

    Raises:
        InvalidInputError: The file cannot be read, or a row is malformed.
    """
    try:
        if path.suffix == ".parquet":
            table = _pyarrow("pyarrow.parquet").read_table(path).to_pylist()
            yield from ((f"row {number}", row) for number, row in enumerate(table, 1))
        elif path.suffix == ".csv":
            text_files.check_start(path)
            yield from _csv_rows(path)
        else:
            text_files.check_start(path)
            yield from _json_rows(path)
    except UnicodeDecodeError:
        raise _not_a_text(path, text_files.not_utf8(path.read_bytes(), str(path))) from None
    except TextError as error:
        raise _not_a_text(path, error) from None
    except InvalidInputError:
        raise
    except FileNotFoundError:
        hint = "; data sets cannot be read from stdin" if str(path) == "-" else ""
        raise InvalidInputError(f"file {path} does not exist; check the path{hint}") from None
    except IsADirectoryError:
        raise InvalidInputError(f"{path} is a folder; name the files in it") from None
    except (OSError, ValueError) as error:
        # ValueError includes pyarrow's ArrowInvalid.
        raise InvalidInputError(f"{path} cannot be read: {error}") from None


def _not_a_text(path: Path, error: TextError) -> TextError:
    reason = str(error).replace(f"{quote_path(path)} is ", "it is ", 1)
    return TextError(f"{path} cannot be read: {reason}")


def _json_rows(path: Path) -> Iterator[NumberedRow]:
    with path.open(encoding="utf-8-sig") as file:
        pairs: Iterable[tuple[str, Any]]
        if path.suffix == ".json":
            rows = _parse(file.read(), f"{path}", hint="if it holds a row per line, name it .jsonl")
            if not isinstance(rows, list):
                raise InvalidInputError(
                    f"{path} does not hold a list of samples; give .json with a list, or .jsonl"
                )
            pairs = ((f"row {number}", row) for number, row in enumerate(rows, 1))
        else:
            pairs = _json_lines(path, file)
        for place, row in pairs:
            if not isinstance(row, dict):
                raise InvalidInputError(
                    f"{path}, {place}: expected a JSON object for each sample, such as"
                    f' {{"context": ...}}, got {type(row).__name__} {quote(row)}'
                )
            yield place, row


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        # Files that were joined have a byte-order mark at the start of each.
        text = line.lstrip(_BYTE_ORDER_MARK).strip()
        if not text:
            continue
        hint = "mend the line, or remove it"
        if not line.endswith("\n"):
            hint = "the file ends here and may be cut off: get it whole, or remove the line"
        if text in ("[", "{"):
            hint = "a row takes one line here; name the file .json if it holds one list"
        yield f"line {number}", _parse(text, f"{path}, line {number}", hint=hint)


def _parse(text: str, place: str, *, hint: str) -> Any:
    """Parse JSON.

    Raises:
        InvalidInputError: It is not JSON; the message names the place.
    """
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        found = f"{error.msg}, column {error.colno}"
        excerpt = error.doc[max(0, error.pos - 20) : error.pos + 20]
        raise InvalidInputError(
            f"{place}{line}: invalid JSON ({found}, at {quote(excerpt)}); {hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        # Integers of more than 4,300 digits, thousands of lists in lists, and fields named twice.
        raise InvalidInputError(f"{place}: invalid JSON ({error}); correct it") from None


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object, none of which may replace another."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the field {quote(_repeated([name for name, _ in pairs]))} comes twice")
    return fields


def _repeated(names: Sequence[str]) -> str:
    """Return the first name that comes again."""
    return next(name for index, name in enumerate(names) if name in names[:index])


def _csv_rows(path: Path) -> Iterator[NumberedRow]:
    # The default limit is 131,072 characters, which a long context exceeds.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if len(set(columns)) < len(columns):
                raise InvalidInputError(
                    f"{path}, line 1: the column {quote(_repeated(columns))} comes twice; rename"
                    " one of them"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidInputError(
                        f"{path}, line {reader.line_num}: the header has {len(columns)} columns,"
                        " this row has a different number"
                    )
                yield f"line {reader.line_num}", dict(row)
    except csv.Error as error:
        raise InvalidInputError(f"{path}, line {reader.line_num}: invalid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the path's suffix, overwriting an existing file."""
    if path.suffix == ".parquet":
        table = _pyarrow("pyarrow").Table.from_pylist([_encode(row, dict) for row in rows])
        _pyarrow("pyarrow.parquet").write_table(table, path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(_encode(row, list | dict) for row in rows)
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _encode(row: Mapping[str, Any], types: Any) -> dict[str, Any]:
    """Replace values of these types by their JSON."""
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, types) else value
        for name, value in row.items()
    }


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InvalidInputError(
            "parquet needs the package pyarrow, which is not installed; pip install pyarrow, or"
            " use .csv or .jsonl"
        ) from None
