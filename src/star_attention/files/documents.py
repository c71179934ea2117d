"""Documents (PDF, Word, EPUB, HTML) read as text, by the optional package markitdown.

Headings, lists and tables become Markdown. Pictures, comments, and the headers and footers of Word
documents are left out.
"""

from __future__ import annotations

import io
import os
import re

from star_attention.errors import MissingPackageError, TextError, first_line, quote_path
from star_attention.files.kinds import HTML, STDIN, FileKind, is_html, recognize
from star_attention.files.text import decode, read_bytes

_READERS = {
    ".pdf": "PdfConverter",
    ".docx": "DocxConverter",
    ".epub": "EpubConverter",
    ".html": "HtmlConverter",
}
"""Readers of markitdown, by the suffix of their documents."""

_PACKAGE = "the package markitdown (pip install 'star-attention[documents]')"


def read_document(path: str | os.PathLike[str]) -> str:
    """Return the text of a document: PDF, Word (.docx), EPUB, HTML, or plain text in UTF-8.

    Its first bytes say what it is, not its name. Plain text is returned as it is. Everything else
    is read by markitdown, which the extra `documents` installs: headings, lists and tables become
    Markdown; pictures, comments, and the headers and footers of Word documents are left out.

    Args:
        path: the file.

    Raises:
        TextError: a file that cannot be read, has no text in it (a scan), or is of another kind.
        MissingPackageError: markitdown is not installed.
    """
    data = read_bytes(path)
    kind = document_kind(data)
    return decode(data, str(path)) if kind is None else document_text(data, kind, str(path))


def document_kind(data: bytes) -> FileKind | None:
    """Return the kind of a document that can be read as text; None for anything else."""
    kind = HTML if is_html(data) else recognize(data)
    return kind if kind is not None and kind.document else None


def document_text(data: bytes, kind: FileKind, source: str) -> str:
    """Return the text of a document.

    Args:
        data: the whole file.
        kind: what `document_kind` returned for it.
        source: its path, or `kinds.STDIN`, for messages.

    Raises:
        TextError: it cannot be read, or has no text.
        MissingPackageError: markitdown is not installed.
    """
    shown = source if source == STDIN else quote_path(source)
    advice = kind.advice(source)
    if kind is HTML:
        # Refuses other encodings: markitdown would take them for UTF-8.
        data = decode(data, source).encode()
    missing = MissingPackageError(
        f"{shown} is {kind.name}, and reading it needs {_PACKAGE}; install it, or {advice}"
    )
    try:
        import markitdown
        from markitdown import converters
    except ImportError:
        raise missing from None
    info = markitdown.StreamInfo(extension=kind.document, charset="utf-8" if kind is HTML else None)
    # Only the one reader: markitdown would take a broken file for plain text.
    reader = markitdown.MarkItDown(enable_builtins=False, enable_plugins=False)
    reader.register_converter(getattr(converters, _READERS[kind.document])())
    try:
        result = reader.convert_stream(io.BytesIO(data), stream_info=info)
    except markitdown.MissingDependencyException:
        raise missing from None
    except Exception as error:
        # The readers raise whatever they meet in a broken or encrypted file.
        raise TextError(
            f"{shown} is {kind.name} that cannot be read ({_reason(error)}); check that it opens"
            f" without a password, or {advice}"
        ) from error
    text = re.sub(r"\r\n?", "\n", result.markdown)
    if not text.strip():
        raise TextError(
            f"{shown} is {kind.name} without text in it, such as a scan; read it by OCR first, for"
            " example with ocrmypdf"
        )
    return text


def _reason(error: Exception) -> str:
    """Return what a reader met, without the frames that markitdown adds."""
    attempts = getattr(error, "attempts", None) or []
    info = attempts[0].exc_info if attempts else None
    return first_line(info[1] if info else error)
