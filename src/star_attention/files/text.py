"""Text files, read unchanged: UTF-8, nothing replaced or truncated; anything else is named."""

from __future__ import annotations

import os
import re
from pathlib import Path

from star_attention.errors import TextError, quote_path
from star_attention.files.kinds import (
    PDF,
    STDIN,
    FileKind,
    byte_order_mark,
    escaped_encoding,
    is_late_pdf,
    recognize,
    shell,
    unmarked_encoding,
)

_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
_START_BYTES = 1 << 16
_INTO = " {file} > {text}"

_BINARY = re.compile(rb"[\x01-\x06\x0e-\x1a]")
"""Control characters that texts do not have; those of terminals and printers aside."""

_FEW_FOREIGN_BYTES = 0.25
"""Share of bytes outside ASCII that Western European texts stay below."""


def read_text_file(path: str | os.PathLike[str]) -> str:
    """Read a text file. A leading byte-order mark is removed.

    Raises:
        TextError: it cannot be read, or is not UTF-8; the message says what it is.
    """
    return decode(read_bytes(path), str(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file.

    Raises:
        TextError: the file is missing, a folder or unreadable.
    """
    shown = quote_path(path)
    if not shown:
        raise TextError("the name of a text file is empty; give its path")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise TextError(f"there is no text file {shown}; check the path") from None
    except IsADirectoryError:
        raise TextError(f"{shown} is a folder; name the text files in it") from None
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the name.
        raise TextError(
            f"cannot read the text file {shown} ({getattr(error, 'strerror', None) or error});"
            " check its name and its permissions"
        ) from error


def check_start(path: str | os.PathLike[str]) -> None:
    """Raise `TextError` if a file begins like something else than UTF-8 text.

    For files that are read line by line.
    """
    with open(path, "rb") as file:
        start = file.read(_START_BYTES)
    kind = recognize(start)
    if kind is not None:
        raise kind_error(str(path), kind)
    if byte_order_mark(start) or unmarked_encoding(start):
        raise not_utf8(start, str(path))


def decode(data: bytes, source: str) -> str:
    """Return the text of a file's bytes, without a leading byte-order mark.

    Args:
        data: the whole file.
        source: its path, or `kinds.STDIN`.

    Raises:
        TextError: it is another kind of file, a saved context, not UTF-8 (with the offset of the
            first bad byte), or contains NULs.
    """
    kind = recognize(data)
    if kind is not None:
        raise kind_error(source, kind)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise not_utf8(data, source) from None
    if "\0" in text:
        raise _nul_error(data, source)
    escaped = escaped_encoding(data)
    if escaped:
        raise TextError(
            f"{_shown(source)} looks like {escaped}, not UTF-8; {_iconv(escaped, source)}"
        )
    return text.removeprefix(_BOM)


def kind_error(source: str, kind: FileKind) -> TextError:
    """Return the error for a file that is not a text, with what to do."""
    return TextError(f"{_shown(source)} is {kind.name}, not a text; {kind.advice(source)}")


def not_utf8(data: bytes, source: str) -> TextError:
    """Return the error for a text in another encoding, with what to do."""
    from star_attention.storage.header import is_saved_header

    if is_saved_header(data):
        return saved_context_error(source)
    if is_late_pdf(data):
        return kind_error(source, PDF)
    mark = byte_order_mark(data)
    encoding = mark or unmarked_encoding(data)
    if mark:
        finding = f"{_bad_byte(data, 0)} (the byte-order mark of {mark})"
    elif encoding:
        finding = f"it looks like {encoding} without a byte-order mark"
    else:
        return _other_encoding(data, source)
    return TextError(f"{_shown(source)} is not UTF-8: {finding}; {_iconv(encoding, source)}")


def saved_context_error(source: str) -> TextError:
    """Return the error for a saved context in place of a text."""
    return TextError(
        f"{_shown(source)} is a saved context, not a text; use `star-attention ask` to answer"
        " queries about it"
    )


def _other_encoding(data: bytes, source: str) -> TextError:
    """Return the error for a text that is neither UTF-8 nor wide: an 8-bit encoding, or damage."""
    try:
        data.decode("utf-8")
        raise AssertionError("the text is UTF-8")
    except UnicodeDecodeError as error:
        start, reason = error.start, error.reason
    text = data.decode("utf-8", errors="replace")
    replaced = text.count("\N{REPLACEMENT CHARACTER}") - data.count(b"\xef\xbf\xbd")
    characters = sum(character > "\x7f" for character in text) - replaced
    found = f"{_shown(source)} is not UTF-8: {_bad_byte(data, start)} ({reason})"
    if _is_cesu8(data):
        command = "uconv -f CESU-8 -t UTF-8"
        convert = shell(source, command + _INTO, command, same_format=True)
        return TextError(
            f"{found}; it is CESU-8, in which characters are two surrogates: convert it first, for"
            f" example with ICU's {convert}"
        )
    # No 8-bit encoding writes NULs: weights, arrays, programs, fonts, ...
    nuls = data.count(0)
    if nuls:
        return TextError(
            f"{found}, and contains {nuls:,} NUL {'byte' if nuls == 1 else 'bytes'}, so no"
            " encoding reads it as text; give a text, or get it whole if it was one"
        )
    if characters > replaced:
        drop = "iconv -c -f UTF-8 -t UTF-8"
        return TextError(
            f"{found}; the rest is UTF-8, so the file is damaged: get it whole, or drop what"
            f" cannot be read ({shell(source, drop + _INTO, drop, same_format=True)})"
        )
    foreign = sum(byte > 0x7F for byte in data[:_START_BYTES]) / len(data[:_START_BYTES])
    if foreign > _FEW_FOREIGN_BYTES:
        return TextError(
            f"{found}; find out its encoding (GB18030, SHIFT_JIS, KOI8-R, ...), then"
            f" {_iconv('ENCODING', source)}"
        )
    return TextError(f"{found}; {_iconv(_western(data), source)}")


def _western(data: bytes) -> str:
    """Return the Western European encoding in which every byte is a character."""
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "ISO-8859-1"
    return "WINDOWS-1252"


def _iconv(encoding: str, source: str) -> str:
    command = f"iconv -f {encoding} -t UTF-8"
    where = " in the pipe" if source == STDIN else ""
    convert = shell(source, command + _INTO, command, same_format=True)
    return f"convert it first{where}, for example with: {convert}"


def _nul_error(data: bytes, source: str) -> TextError:
    encoding = unmarked_encoding(data)
    if encoding:
        return not_utf8(data, source)
    count = data.count(0)
    if _BINARY.search(data):
        return TextError(
            f"{_shown(source)} contains {count:,} NUL {'byte' if count == 1 else 'bytes'} and other"
            " bytes that no text has, so no encoding reads it as text; give a text"
        )
    command = "tr -d '\\000'"
    remove = shell(source, f"{command} < {{file}} > {{text}}", command, same_format=True)
    return TextError(
        f"{_shown(source)} contains {count:,} NUL {'byte' if count == 1 else 'bytes'}, the first at"
        f" {data.index(0):,} of {len(data):,}, and so is not plain text; give a text,"
        f" or remove them ({remove})"
    )


def _is_cesu8(data: bytes) -> bool:
    """True for a text that is UTF-8 but for pairs of surrogates, which Java and databases write."""
    try:
        text = data.decode("utf-8", "surrogatepass")
        text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeError:
        return False
    return True


def _bad_byte(data: bytes, at: int) -> str:
    return f"byte {at:,} of {len(data):,} is 0x{data[at]:02x}"


def _shown(source: str) -> str:
    return source if source == STDIN else quote_path(source)
