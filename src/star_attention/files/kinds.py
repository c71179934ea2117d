"""Kinds of files that are not plain text, recognized by their first bytes, each with a remedy."""

from __future__ import annotations

import codecs
import functools
import io
import re
import shlex
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

STDIN = "stdin"
"""Name of a text that comes through a pipe and has no file."""

_TEXT_SUFFIXES = {".csv", ".htm", ".html", ".json", ".jsonl", ".md", ".tsv", ".txt"}


@dataclass(frozen=True)
class FileKind:
    """A kind of file that is not plain text.

    Attributes:
        name: what it is, with its article.
        command: shell command that writes its text to `{text}` from `{file}`; "" if there is none.
        filter: the same for a pipe; "" if there is none.
        document: suffix under which the extra `documents` reads it; "" if it does not.
        remedy: what else to do.
    """

    name: str
    command: str = ""
    filter: str = ""
    document: str = ""
    remedy: str = ""

    def advice(self, source: str) -> str:
        """Return what to do with a file of this kind, or with `STDIN`."""
        command = shell(source, self.command, self.filter)
        if not command:
            return self.remedy or "give its text"
        return f"convert it first{' in the pipe' * (source == STDIN)}, for example with: {command}"


def shell(source: str, command: str, filter: str, *, same_format: bool = False) -> str:
    """Return the command for a file, or the filter for `STDIN`.

    Args:
        source: the file.
        command: its `{text}` becomes the name of a file that does not exist.
        filter: the same for a pipe.
        same_format: give the new file the suffix of the old one.
    """
    if source == STDIN:
        return filter
    path = Path(source)
    if not same_format:
        # book.csv.gz becomes book.csv, and report.pdf becomes report.txt.
        path = path.with_suffix("") if path.suffix else path
        if path.suffix.lower() not in _TEXT_SUFFIXES:
            path = path.with_name(f"{path.name}.txt")
    names = (
        path.with_name(f"{path.stem}{middle}{path.suffix or '.txt'}")
        for middle in ("", ".utf-8", ".2", ".3", ".new")
    )
    text = next((name for name in names if not name.exists() and str(name) != source), path)
    return command.format(file=shlex.quote(source), text=shlex.quote(str(text)))


def _pandoc(document: str) -> tuple[str, str]:
    return f"pandoc -f {document} -t plain {{file}} -o {{text}}", f"pandoc -f {document} -t plain"


_IMAGE = "give the text in it (OCR reads it, for example tesseract)"
_SOUND = "give a transcript of it"
_TABLE = "libreoffice --headless --convert-to csv {file}"
_OFFICE = "libreoffice --headless --convert-to txt:Text {file}"
_UNZIP = FileKind(
    "a zip archive", "unzip -p {file} > {text}", "funzip", remedy="unpack it, and give its texts"
)
DAMAGED = FileKind("a damaged zip archive or Office file", remedy="get it whole")

PDF = FileKind("a PDF", "pdftotext {file} {text}", "pdftotext - -", ".pdf")
_LFS = FileKind(
    "a pointer of git LFS",
    remedy="run `git lfs pull` in its folder, or download the file itself",
)
_PGP = FileKind("encrypted by PGP", "gpg -d -o {text} {file}", "gpg -d")

_BY_START = (
    (rb"(?:\xef\xbb\xbf)?\s*%PDF-\d", PDF),
    (rb"\s*\{\\rtf\d", FileKind("an RTF document", *_pandoc("rtf"))),
    (rb"version https://git-lfs\S+\r?\noid ", _LFS),
    (rb"\s*-----BEGIN PGP MESSAGE-----", _PGP),
    (
        rb"age-encryption\.org/v1\n|-----BEGIN AGE ENCRYPTED FILE-----",
        FileKind("encrypted by age", "age -d -o {text} {file}", "age -d"),
    ),
    (rb"Salted__", FileKind("encrypted by openssl", remedy="decrypt it first")),
    (rb"%!PS", FileKind("a PostScript file", "ps2ascii {file} {text}", "ps2ascii")),
    (rb"\x1f\x8b", FileKind("gzip", "gunzip -c {file} > {text}", "gunzip -c")),
    (rb"BZh\d1AY&SY", FileKind("bzip2", "bunzip2 -c {file} > {text}", "bunzip2 -c")),
    (rb"\xfd7zXZ\0", FileKind("xz", "xz -dc {file} > {text}", "xz -dc")),
    (rb"\x28\xb5\x2f\xfd", FileKind("zstd", "zstd -dc {file} > {text}", "zstd -dc")),
    (rb"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", "7z x -so {file} > {text}")),
    (rb"Rar!\x1a\x07", FileKind("a RAR archive", "unrar p -inul {file} > {text}")),
    (rb"(?s:.{257})ustar", FileKind("a tar archive", "tar -xOf {file} > {text}", "tar -xO")),
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        FileKind("an old Office file (.doc, .xls, .ppt)", _OFFICE, remedy="save it as text"),
    ),
    (rb"\x89PNG\r\n", FileKind("a PNG image", remedy=_IMAGE)),
    (rb"\xff\xd8\xff", FileKind("a JPEG image", remedy=_IMAGE)),
    (rb"GIF8[79]a", FileKind("a GIF image", remedy=_IMAGE)),
    (rb"RIFF(?s:.{4})WEBP", FileKind("a WebP image", remedy=_IMAGE)),
    (rb"II\*\0|MM\0\*", FileKind("a TIFF image", remedy=_IMAGE)),
    (rb"BM(?s:.{4})\0\0\0\0", FileKind("a BMP image", remedy=_IMAGE)),
    (rb"\0(?s:.{3})ftyp(?:heic|heix|mif1|avif)", FileKind("a HEIC or AVIF image", remedy=_IMAGE)),
    (rb"\0(?s:.{3})ftyp", FileKind("a video or sound file", remedy=_SOUND)),
    (
        rb"RIFF(?s:.{4})WAVEfmt |ID3[\2-\4]|fLaC\0|OggS\0",
        FileKind("a sound file", remedy=_SOUND),
    ),
    (rb"SQLite format 3\0", FileKind("an SQLite database", remedy="export its texts")),
    (
        rb"PAR1[\0-\x1f]",
        FileKind("a Parquet table", remedy="export its texts, or name it *.parquet"),
    ),
    (rb"GGUF[\1-\x08]\0", FileKind("a GGUF model", remedy="give it with --model, and a text here")),
    (rb"\x7fELF", FileKind("a program", remedy="give a text")),
)

_BY_MEMBER = (
    ("word/", FileKind("a Word document (.docx)", *_pandoc("docx"), ".docx")),
    ("xl/", FileKind("an Excel workbook (.xlsx)", _TABLE, remedy="save it as CSV")),
    ("ppt/", FileKind("a PowerPoint file (.pptx)", _OFFICE, remedy="save it as text")),
    ("META-INF/container.xml", FileKind("an EPUB book", *_pandoc("epub"), ".epub")),
    ("META-INF/manifest.xml", FileKind("an OpenDocument file (.odt, .ods)", *_pandoc("odt"))),
)

HTML = FileKind("an HTML page", document=".html")

_HTML_START = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html)\b", re.I | re.S
)


def recognize(data: bytes) -> FileKind | None:
    """Return the kind of a file by its first bytes; None for what may be plain text.

    Args:
        data: the whole file. Its beginning will do for all but the members of a zip archive.
    """
    start = data[:1024]
    match = _any_start().match(start)
    if match is not None and match.lastindex is not None:
        return _BY_START[match.lastindex - 1][1]
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        try:
            names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        except (zipfile.BadZipFile, ValueError, OSError):
            return DAMAGED
        kinds = (kind for member, kind in _BY_MEMBER if any(n.startswith(member) for n in names))
        return next(kinds, _UNZIP)
    return None


@functools.cache
def _any_start() -> re.Pattern[bytes]:
    """Return a pattern of all beginnings, the first that matches being the group."""
    return re.compile(b"|".join(b"(%s)" % pattern for pattern, _ in _BY_START))


def is_html(data: bytes) -> bool:
    """True if a text begins like a page in HTML."""
    return _HTML_START.match(data.removeprefix(b"\xef\xbb\xbf")[:8192]) is not None


_HEADER_WITHIN = 1024
"""Bytes in which the header of a PDF may come after something else, as its readers accept it."""


def is_late_pdf(data: bytes) -> bool:
    """True for what is not text, and has the header of a PDF near its beginning."""
    return re.search(rb"%PDF-\d\.\d", data[:_HEADER_WITHIN]) is not None


_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)

_FEWEST_CHARACTERS = 40
"""Characters from which on a binary file is unlikely to have those of texts alone in UTF-16."""

_FEWEST_ZEROS = 0.05
"""Least share of characters with a zero byte in a text in UTF-16: at least its spaces have one."""


def byte_order_mark(data: bytes) -> str:
    """Return the encoding whose byte-order mark a text begins with: UTF-16, UTF-32, or ""."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), "")


def unmarked_encoding(data: bytes) -> str:
    """Return the encoding of a text in UTF-16 or UTF-32 without a mark, as iconv names it.

    "" for any other.
    """
    start = data[: 1 << 16]
    zeros = [start[offset::2].count(0) for offset in range(2)]
    if not any(zeros):
        return ""
    # In UTF-16LE the second byte of an ASCII character is zero.
    order = "LE" if zeros[1] > zeros[0] else "BE"
    if _decodes(start, f"UTF-32{order}"):
        return f"UTF-32{order}"
    is_regular = min(zeros) * 10 <= max(zeros) >= _FEWEST_ZEROS * len(start) / 2
    if is_regular and _decodes(start, f"UTF-16{order}"):
        return f"UTF-16{order}"
    # Texts in Chinese or Japanese have few zeros, and these may be anywhere.
    return next((name for name in ("UTF-16LE", "UTF-16BE") if _is_all_text(start, name)), "")


def escaped_encoding(data: bytes) -> str:
    """Return the encoding of a text in ASCII that switches to others by escapes, or "".

    Escapes of terminals are others.
    """
    return next((name for escape, name in _ESCAPES if escape in data), "")


_ESCAPES = (
    (b"\x1b$B", "ISO-2022-JP"),
    (b"\x1b$@", "ISO-2022-JP"),
    (b"\x1b$)C", "ISO-2022-KR"),
    (b"\x1b$)A", "ISO-2022-CN"),
    (b"\x1b$)G", "ISO-2022-CN"),
)


def _decodes(start: bytes, encoding: str) -> bool:
    """True if the beginning of a text is valid in an encoding, and has no NUL in it."""
    text = _decoded(start, encoding)
    return bool(text) and "\0" not in text


def _is_all_text(start: bytes, encoding: str) -> bool:
    """True if the beginning of a text has nothing but characters of texts in an encoding."""
    text = _decoded(start, encoding)
    kinds = {unicodedata.category(character) for character in text if character not in "\t\n\r\f"}
    return len(text) >= _FEWEST_CHARACTERS and kinds.isdisjoint({"Cc", "Cn", "Co"})


def _decoded(start: bytes, encoding: str) -> str:
    """Return the beginning of a text in an encoding; "" if it is not valid."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(start)
    except UnicodeDecodeError:
        return ""
