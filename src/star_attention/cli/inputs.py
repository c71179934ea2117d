"""Texts and queries from files and stdin, exactly as they are: UTF-8, nothing replaced, nothing cut."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from star_attention.errors import TextError, TokenError

STDIN = "-"
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def read_text(name: str) -> str:
    """The text of a file, or of stdin for `-`; a byte-order mark at its head is no part of it.

    Raises `TextError` naming the file: missing, a folder, unreadable, a saved context, or not UTF-8 (with the offset of the first
    bad byte).
    """
    shown = "stdin" if name == STDIN else name
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except FileNotFoundError:
        raise TextError(
            f"there is no text file {shown}; check the path, or give - for stdin"
        ) from None
    except IsADirectoryError:
        if any(Path(name).glob("rank-*.safetensors")):
            raise _saved(shown) from None
        raise TextError(f"{shown} is a folder; give the text files in it by name") from None
    except OSError as error:
        raise TextError(
            f"the text file {shown} cannot be read: {error.strerror or error}"
        ) from error
    try:
        return data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        from star_attention.storage.saved import is_saved_header

        if is_saved_header(data):
            raise _saved(shown) from None
        raise TextError(
            f"{shown} is not UTF-8: byte {error.start:,} of {len(data):,} is 0x{data[error.start]:02x} ({error.reason});"
            f" convert it first, for example with: iconv -f WINDOWS-1252 -t UTF-8 {'' if name == STDIN else shown}"
        ) from None


def _saved(shown: str) -> TextError:
    return TextError(
        f"{shown} is a saved context and no text; `star-attention ask` answers queries on it"
    )


def read_context(files: list[str]) -> str:
    """The texts of several files in order, with a line break between them."""
    if files.count(STDIN) > 1:
        raise typer.BadParameter("- (stdin) can be read only once", param_hint="FILES")
    text = "\n".join(read_text(name) for name in files)
    if not text.strip():
        raise TokenError(f"the text of {', '.join(files)} is empty; give at least one word")
    return text


def read_queries(
    queries: list[str] | None, file: str | None, *, context_files: list[str]
) -> list[str]:
    """The queries of `--query`, then those of `--query-file`, one a line; empty lines are none."""
    found = list(queries or [])
    for query in found:
        if not query.strip():
            raise TokenError("a query is empty; give --query at least one word")
        if any(
            "\ud800" <= character <= "\udfff" for character in query
        ):  # how Python keeps undecodable bytes
            raise TextError(
                f"the query {query!r} is not UTF-8; check the terminal's locale, or use --query-file"
            )
    if file is not None:
        if file == STDIN and STDIN in context_files:
            raise typer.BadParameter("stdin is read as text already", param_hint="--query-file")
        lines = [line.rstrip("\r") for line in read_text(file).split("\n")]
        of_file = [line for line in lines if line.strip()]
        if not of_file:
            raise TokenError(f"the query file {file} has no queries; write one a line")
        found += of_file
    return found
