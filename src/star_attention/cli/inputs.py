"""Read texts and queries from files and stdin, unchanged: UTF-8, nothing replaced or truncated."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from star_attention.errors import TextError, TokenError, quote
from star_attention.files import documents, kinds
from star_attention.files.text import decode, read_bytes, saved_context_error

STDIN = "-"

Note = Callable[[str], None]
"""Prints a line about how a text was read."""


def read_text(name: str) -> str:
    """Read a text file, or stdin for `-`. A leading byte-order mark is removed.

    Raises:
        TextError: If the file is missing, a folder, unreadable, or not UTF-8 text (the message says
            what it is).
    """
    return decode(_read_bytes(name), _source(name))


def read_json(name: str) -> Any:
    """Read a JSON file, or stdin for `-`.

    Raises:
        TextError: If it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(name))
    except json.JSONDecodeError as error:
        raise TextError(f"{_source(name)} is not JSON: {error}") from error


def _source(name: str) -> str:
    return kinds.STDIN if name == STDIN else name


def _read_bytes(name: str) -> bytes:
    if name == STDIN:
        return sys.stdin.buffer.read()
    if os.path.isdir(name) and any(Path(name).glob("rank-*.safetensors")):
        raise saved_context_error(name)
    return read_bytes(name)


def read_context(files: list[str], note: Note, *, html_to_text: bool = False) -> str:
    """Read several files in order, texts and documents, and join them with line breaks.

    Args:
        files: paths, `-` for stdin.
        note: prints how documents were read.
        html_to_text: leave out the markup of HTML pages.

    Raises:
        TextError: If a file cannot be read as text.
        MissingPackageError: If a document needs the extra `documents`.
        TokenError: If there is no text in them.
    """
    if files.count(STDIN) > 1:
        raise typer.BadParameter("- (stdin) can be read only once", param_hint="FILES")
    text = "\n".join(_read_part(name, note, html_to_text) for name in files)
    if not text.strip():
        raise TokenError(f"the text of {', '.join(files)} is empty; give at least one word")
    return text


def _read_part(name: str, note: Note, html_to_text: bool) -> str:
    data, source = _read_bytes(name), _source(name)
    kind = documents.document_kind(data)
    if kind is None:
        return decode(data, source)
    if kind is kinds.HTML and not html_to_text:
        note(f"{source} is HTML, and read with its markup; --html-to-text leaves it out")
        return decode(data, source)
    text = documents.document_text(data, kind, source)
    note(f"{source} is {kind.name}: read {len(text):,} characters of text from it")
    return text


def check_utf8(name: str, text: str, remedy: str = "") -> None:
    """Raise `TextError` for a text from the command line or terminal that is not UTF-8."""
    # Lone surrogates are how Python keeps bytes that it cannot decode.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise TextError(
            f"the {name} {quote(text)} is not UTF-8; check the terminal's locale"
            f"{f', {remedy}' if remedy else ''}"
        )


def read_queries(
    queries: list[str] | None, file: str | None, *, context_files: list[str]
) -> list[str]:
    """Return the queries of `--query`, then those of `--query-file`: one per non-empty line.

    Raises:
        TextError: If a query or the file is not UTF-8.
        TokenError: If a query is empty, or the file has none.
    """
    for query in queries or []:
        if not query.strip():
            raise TokenError("a query is empty; give --query at least one word")
        check_utf8("query", query, "or use --query-file")
    if file is None:
        return list(queries or [])
    if file == STDIN and STDIN in context_files:
        raise typer.BadParameter(
            "stdin already provides the text; use a file", param_hint="--query-file"
        )
    lines = [line.rstrip("\r") for line in read_text(file).split("\n")]
    file_queries = [line for line in lines if line.strip()]
    if not file_queries:
        raise TokenError(f"the query file {file} has no queries; write one per line")
    return [*(queries or []), *file_queries]
