"""Read texts and queries from files and stdin, unchanged: UTF-8, nothing replaced or truncated."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from star_attention.errors import TextError, TokenError, quote, quote_path

STDIN = "-"
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def read_text(name: str) -> str:
    """Read a text file, or stdin for `-`. A leading byte-order mark is removed.

    Raises:
        TextError: If the file is missing, a folder, unreadable, a saved context, or not UTF-8
            (with the offset of the first bad byte).
    """
    shown_name = "stdin" if name == STDIN else quote_path(name)
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except FileNotFoundError:
        raise TextError(
            f"there is no text file {shown_name}; check the path, or give - for stdin"
        ) from None
    except IsADirectoryError:
        if any(Path(name).glob("rank-*.safetensors")):
            raise _saved_context_error(shown_name) from None
        raise TextError(f"{shown_name} is a folder; name the text files in it") from None
    except OSError as error:
        raise TextError(
            f"cannot read the text file {shown_name}: {error.strerror or error};"
            " check its permissions"
        ) from error
    try:
        return data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        from star_attention.storage.reading import is_saved_header

        if is_saved_header(data):
            raise _saved_context_error(shown_name) from None
        raise TextError(
            f"{shown_name} is not UTF-8: byte {error.start:,} of {len(data):,} is"
            f" 0x{data[error.start]:02x} ({error.reason}); convert it first, for example with:"
            f" iconv -f WINDOWS-1252 -t UTF-8 {'' if name == STDIN else shown_name}"
        ) from None


def _saved_context_error(name: str) -> TextError:
    return TextError(
        f"{name} is a saved context, not a text; use `star-attention ask` to answer queries"
        " about it"
    )


def read_context(files: list[str]) -> str:
    """Read several files in order and join them with line breaks.

    Raises:
        TextError: If a file cannot be read as text.
        TokenError: If there is no text in them.
    """
    if files.count(STDIN) > 1:
        raise typer.BadParameter("- (stdin) can be read only once", param_hint="FILES")
    text = "\n".join(read_text(name) for name in files)
    if not text.strip():
        raise TokenError(f"the text of {', '.join(files)} is empty; give at least one word")
    return text


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
        # Lone surrogates are how Python keeps bytes that it cannot decode.
        if any("\ud800" <= character <= "\udfff" for character in query):
            raise TextError(
                f"the query {quote(query)} is not UTF-8; check the terminal's locale,"
                " or use --query-file"
            )
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
