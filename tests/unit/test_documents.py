"""Documents (PDF, Word, EPUB, HTML) as texts, with the extra `documents` and without."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import star_attention
from star_attention.errors import MissingPackageError, TextError
from tests.command_line import MODEL, NEEDLE, NOISE, failed, ok

SENTENCE = NEEDLE.strip()
PAGE = """<!DOCTYPE html>
<html><head><title>Keys</title><style>p { color: red }</style></head>
<body><h1>Caf\u00e9</h1><p>The secret <b>number</b> is 4910508.</p></body></html>
"""


def pdf(*lines: str) -> bytes:
    """A PDF of one page."""
    shown = " ".join(f"({line}) Tj T*" for line in lines)
    page = f"BT /F1 12 Tf 14 TL 72 720 Td {shown} ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        " /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(page)} >>\nstream\n{page}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n"
    tail = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return (data + head + table + tail).encode()


def zipped(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def word(*paragraphs: str) -> bytes:
    """A Word document."""
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    schemas = "http://schemas.openxmlformats.org"
    kinds = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    relation = f"{schemas}/officeDocument/2006/relationships/officeDocument"
    return zipped(
        {
            "[Content_Types].xml": f'<Types xmlns="{schemas}/package/2006/content-types">'
            f'<Override PartName="/word/document.xml" ContentType="{kinds}"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{schemas}/package/2006/relationships">'
            f'<Relationship Id="r1" Type="{relation}" Target="word/document.xml"/></Relationships>',
            "word/document.xml": f'<w:document xmlns:w="{schemas}/wordprocessingml/2006/main">'
            f"<w:body>{body}</w:body></w:document>",
        }
    )


def epub(text: str) -> bytes:
    """A book of one chapter."""
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:'
            'container"><rootfiles><rootfile full-path="book.opf"/></rootfiles></container>',
            "book.opf": '<package xmlns="http://www.idpf.org/2007/opf"><metadata/><manifest>'
            '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
            '<spine><itemref idref="a"/></spine></package>',
            "a.xhtml": f"<html><body><p>{text}</p></body></html>",
        }
    )


# The name of a file does not say what it is.
DOCUMENTS = {
    "report.pdf": (pdf("The hill is tall.", SENTENCE), f"The hill is tall.\n{SENTENCE}"),
    "no suffix": (b"\n" + pdf(SENTENCE), SENTENCE),
    "letter.docx": (word("The hill is tall.", SENTENCE), f"The hill is tall.\n\n{SENTENCE}"),
    "book.epub": (epub(SENTENCE), SENTENCE),
    "page.txt": (PAGE.encode(), "# Caf\u00e9\n\nThe secret **number** is 4910508."),
    "fragment.htm": (b"<!-- x -->\n<HTML><body>hello</body></HTML>", "hello"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_read_as_text(name: str, tmp_path: Path) -> None:
    pytest.importorskip("markitdown")
    data, text = DOCUMENTS[name]
    (tmp_path / name).write_bytes(data)
    assert star_attention.read_document(tmp_path / name).strip() == text


def test_plain_text_is_returned_as_it_is(tmp_path: Path) -> None:
    text = "  # a heading?\n<b>x</b>\r\n\n\ttab  "
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert star_attention.read_document(str(tmp_path / "a.md")) == text


BROKEN = {
    "scan.pdf": (pdf(), "is a PDF without text in it, such as a scan"),
    "broken.pdf": (b"%PDF-1.4\nThe secret number", "is a PDF that cannot be read"),
    "broken.docx": (
        zipped({"word/document.xml": "<a>"}),
        "is a Word document (.docx) that cannot be read",
    ),
    "latin.html": (PAGE.encode("latin-1"), "is not UTF-8"),
    "table.xlsx": (zipped({"xl/workbook.xml": "<a/>"}), "is an Excel workbook"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_documents_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    """Forbids an empty context, and the source of a broken PDF as its text."""
    pytest.importorskip("markitdown")
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError) as caught:
        star_attention.read_document(tmp_path / name)
    assert f"{name} {message}" in str(caught.value)


def test_the_command_line_reads_documents(tmp_path: Path) -> None:
    pytest.importorskip("markitdown")
    (tmp_path / "report.pdf").write_bytes(pdf("The hill is tall.", SENTENCE))
    (tmp_path / "more.txt").write_text(NOISE, encoding="utf-8")
    options = ["--query", "x", "--max-new-tokens", "1", "--json"]
    command = ["generate", *MODEL, tmp_path / "report.pdf", tmp_path / "more.txt", *options]
    done = ok(*command)
    assert f"{tmp_path / 'report.pdf'} is a PDF: read 68 characters of text from it" in done.err
    text = star_attention.read_document(tmp_path / "report.pdf") + "\n" + NOISE
    plain = ok("generate", *MODEL, "-", *options, stdin=text)
    tokens = [json.loads(each.out)["context_tokens"] for each in (done, plain)]
    assert tokens[0] == tokens[1] > 50
    assert "is a PDF" not in ok(*command, "--quiet").err
    piped = ok("generate", *MODEL, "-", *options, stdin=pdf(SENTENCE))
    assert "stdin is a PDF: read" in piped.err


def test_html_stays_as_it_is_unless_asked(tmp_path: Path) -> None:
    pytest.importorskip("markitdown")
    (tmp_path / "page.html").write_text(PAGE, encoding="utf-8")
    options = ["--query", "x", "--max-new-tokens", "1", "--json"]
    command = ["generate", *MODEL, tmp_path / "page.html", *options]
    with_markup, without = ok(*command), ok(*command, "--html-to-text")
    assert "page.html is HTML, and read with its markup; --html-to-text leaves" in with_markup.err
    assert "page.html is an HTML page: read 41 characters" in without.err
    plain = ok("generate", *MODEL, "-", *options, stdin=PAGE)
    tokens = [json.loads(each.out)["context_tokens"] for each in (with_markup, plain, without)]
    assert tokens[0] == tokens[1] > 2 * tokens[2]


def test_queries_are_no_documents(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.pdf").write_bytes(pdf("What is it?"))
    line = failed("ask", *MODEL, texts / "book.star", "--query-file", tmp_path / "questions.pdf")
    assert "questions.pdf is a PDF, not a text; convert it first" in line
    assert "pdftotext" in line


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names both ways out."""
    monkeypatch.setitem(sys.modules, "markitdown", None)
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf(SENTENCE))
    with pytest.raises(MissingPackageError) as caught:
        star_attention.read_document(path)
    assert str(caught.value) == (
        f"{path} is a PDF, and reading it needs the package markitdown (pip install"
        " 'star-attention[documents]'); install it, or convert it first, for example with:"
        f" pdftotext {path} {path.with_suffix('.txt')}"
    )
    assert "pip install 'star-attention[documents]'" in failed(
        "generate", *MODEL, path, "--query", "x"
    )
    # Text needs no package.
    shutil.copy(__file__, tmp_path / "text")
    assert star_attention.read_document(tmp_path / "text").startswith('"""Documents')
