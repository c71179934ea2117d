"""Files that are not UTF-8 text: named for what they are, with remedies that work."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from star_attention.errors import InvalidInputError, TextError
from star_attention.evals.formats.files import read
from star_attention.evals.samples.sources import prose
from star_attention.files.kinds import recognize, unmarked_encoding
from star_attention.files.text import decode, read_text_file
from tests.command_line import MODEL, NEEDLE, failed, run

TEXT = "Élan at the café: a naïve coöperation.\n" + NEEDLE
ASCII = "The hill is tall.\n" + NEEDLE
CHINESE = "秘密的号码是四九一零五零八。猫坐在垫子上。\n" * 9
KOREAN = "비밀 번호는 사구일영오입니다.\n" * 9
JAPANESE = "秘密の番号は四九一です。\n" * 9
CYRILLIC = "Съешь ещё этих мягких французских булок.\n"


def zipped(**members: str) -> bytes:
    """A zip archive. `__` stands for a slash, `_dot_` for a dot."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), text)
    return buffer.getvalue()


def tarred(text: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("book.txt")
        info.size = len(text.encode())
        archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


# What each file is called, and a word of the remedy.
ESCAPED = "\x1b[31mred\x1b[0m, and a PDF begins with %PDF-1.7; version https://git-lfs"
BINARY = {
    "report.xlsx": (zipped(xl__workbook_dot_xml="<x/>"), "an Excel workbook", "convert-to csv"),
    "talk.pptx": (zipped(ppt__a_dot_xml="<x/>"), "a PowerPoint file", "libreoffice"),
    "text.odt": (zipped(**{"META-INF__manifest_dot_xml": "<x/>"}), "an OpenDocument", "pandoc"),
    "half.docx": (zipped(word__document_dot_xml="<x/>")[:-9], "a damaged zip", "get it whole"),
    "old.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an old Office", "libreoffice"),
    "a.png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG image", "OCR"),
    "a.jpg": (b"\xff\xd8\xff\xe0" + bytes(20), "a JPEG image", "OCR"),
    "a.gif": (b"GIF89a" + bytes(20), "a GIF image", "OCR"),
    "a.webp": (b"RIFF\x24\0\0\0WEBPVP8 ", "a WebP image", "OCR"),
    "a.tiff": (b"II*\0" + bytes(20), "a TIFF image", "OCR"),
    "a.heic": (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC", "OCR"),
    "a.mp4": (b"\0\0\0\x18ftypisom" + bytes(20), "a video", "transcript"),
    "a.mp3": (b"ID3\x03" + bytes(20), "a sound file", "transcript"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7z archive", "7z x"),
    "a.rar": (b"Rar!\x1a\x07\0" + bytes(20), "a RAR archive", "unrar"),
    "a.zst": (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd", "zstd -dc"),
    "a.sqlite": (b"SQLite format 3\0" + bytes(20), "an SQLite", "export"),
    "a.parquet": (b"PAR1" + bytes(20), "a Parquet table", "export"),
    "a.rtf": (rb"{\rtf1\ansi The tea is hot.}", "an RTF document", "pandoc -f rtf"),
    "a.ps": (b"%!PS-Adobe-3.0\n(The tea is hot.) show", "a PostScript file", "ps2ascii"),
    "marked.rtf": (b"\n{\\rtf1 The tea is hot.}", "an RTF document", "pandoc -f rtf"),
    "marked.pdf": (b"\xef\xbb\xbf%PDF-1.4\n\xe2\xe3\xcf\xd3", "a PDF", "pdftotext"),
    "late.pdf": (b"\r\nHTTP/1.1 200 OK\r\n%PDF-1.4\n\xe2\xe3\xcf\xd3", "a PDF", "pdftotext"),
    "book.txt": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n",
        "a pointer of git LFS",
        "git lfs pull",
    ),
    "letter.asc": (b"-----BEGIN PGP MESSAGE-----\n\nhQEMA\n", "encrypted by PGP", "gpg -d"),
    "letter.age": (b"age-encryption.org/v1\n-> X25519 a\n", "encrypted by age", "age -d"),
    "letter.enc": (b"Salted__\x81\x92" + bytes(9), "encrypted by openssl", "decrypt it"),
    "a.gguf": (b"GGUF\x03" + bytes(20), "a GGUF model", "--model"),
}


@pytest.mark.parametrize("name", BINARY)
def test_files_of_other_kinds_are_named(name: str, tmp_path: Path) -> None:
    data, kind, remedy = BINARY[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match="not a text") as caught:
        read_text_file(tmp_path / name)
    assert f"{name} is {kind}" in str(caught.value)
    assert remedy in str(caught.value)
    assert "iconv" not in str(caught.value)


def test_unknown_binary_files_are_no_text_in_another_encoding(tmp_path: Path) -> None:
    """Forbids advice to convert weights from GB18030."""
    files = {
        "a.safetensors": save({"weight": torch.arange(300.0)}),
        "a.npy": b"\x93NUMPY\x01\0v\0" + bytes(90),
        "a.exe": b"MZ\x90\0\x03\0\0\0\x04" + bytes(range(256)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TextError, match="no encoding reads it as text; give a text") as caught:
            read_text_file(tmp_path / name)
        assert f"{name} is not UTF-8: byte " in str(caught.value)
        assert f"contains {data.count(0)} NUL bytes" in str(caught.value)
        assert "iconv" not in str(caught.value)


# Each is converted by the command in its error.
CONVERTED = {
    "book.txt.gz": (gzip.compress(TEXT.encode(), mtime=0), "gzip", TEXT),
    "book.bz2": (bz2.compress(TEXT.encode()), "bzip2", TEXT),
    "book.txt.xz": (lzma.compress(TEXT.encode()), "xz", TEXT),
    "book.zip": (zipped(book_dot_txt=TEXT), "a zip archive", TEXT),
    "book.tar": (tarred(TEXT), "a tar archive", TEXT),
    "marked.txt": (TEXT.encode("utf-16"), "mark of UTF-16", TEXT),
    "marked-be.txt": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "mark of UTF-16", TEXT),
    "marked-32.txt": (TEXT.encode("utf-32"), "mark of UTF-32", TEXT),
    "le.txt": (TEXT.encode("utf-16-le"), "looks like UTF-16LE", TEXT),
    "be.txt": (TEXT.encode("utf-16-be"), "looks like UTF-16BE", TEXT),
    "ascii-le.txt": (ASCII.encode("utf-16-le"), "looks like UTF-16LE", ASCII),
    "cyrillic.txt": (CYRILLIC.encode("utf-16-le"), "looks like UTF-16LE", CYRILLIC),
    "le-32.txt": (TEXT.encode("utf-32-le"), "looks like UTF-32LE", TEXT),
    "be-32.txt": (TEXT.encode("utf-32-be"), "looks like UTF-32BE", TEXT),
    "chinese-be.txt": (CHINESE.encode("utf-16-be"), "looks like UTF-16BE", CHINESE),
    "chinese-le.txt": (CHINESE.encode("utf-16-le"), "looks like UTF-16LE", CHINESE),
    "korean-le.txt": (KOREAN.encode("utf-16-le"), "looks like UTF-16LE", KOREAN),
    "japanese.txt": (JAPANESE.encode("iso2022_jp"), "looks like ISO-2022-JP", JAPANESE),
    "latin book.txt": (TEXT.encode("cp1252"), "byte 0 of 88 is 0xc9", TEXT),
    "latin1.txt": (b"\x81" + TEXT.encode("latin-1"), "is 0x81", "\x81" + TEXT),
    "damaged.txt": (TEXT.encode()[:20] + b"\xff" + TEXT.encode()[20:], "damaged", TEXT),
    "cut.txt": ((TEXT + "é").encode()[:-1], "damaged", TEXT),
    "nul.txt": (TEXT.encode() + b"\0", "1 NUL byte, the first at 92 of 93", TEXT),
}


def remedy_in(message: str) -> str:
    """Return the command that an error advises."""
    shell = re.search(r"(?:with: |\()((?:gunzip|bunzip2|xz|unzip|tar|iconv|tr) .*?)\)?$", message)
    assert shell is not None, message
    return shell[1]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv")
@pytest.mark.parametrize("name", CONVERTED)
def test_the_remedy_works(name: str, tmp_path: Path) -> None:
    """Forbids a remedy for another kind: its result would be read without a word."""
    data, kind, text = CONVERTED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError) as caught:
        read_text_file(tmp_path / name)
    assert kind in str(caught.value)
    before = set(tmp_path.iterdir())
    command = remedy_in(str(caught.value))
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"no {command.split()[0]}")
    subprocess.run(command, shell=True, check="iconv -c" not in command)
    (converted,) = set(tmp_path.iterdir()) - before
    assert read_text_file(converted) == text
    assert (tmp_path / name).read_bytes() == data


@pytest.mark.parametrize("name", ["book.txt.gz", "marked.txt", "le.txt", "latin book.txt"])
def test_the_remedy_in_a_pipe_works(name: str) -> None:
    data, _, text = CONVERTED[name]
    line = failed("generate", *MODEL, "-", "--query", "x", stdin=data)
    assert line.startswith("error: stdin is ")
    done = subprocess.run(remedy_in(line), shell=True, check=True, input=data, capture_output=True)
    assert done.stdout.decode() == text


def test_another_eight_bit_encoding_is_not_taken_for_a_western_one() -> None:
    """Forbids the advice to convert it from WINDOWS-1252, which gives garbage without an error."""
    for text, encoding in (
        (CYRILLIC, "koi8-r"),
        ("\u732b\u304c\u597d\u304d\u3002" * 9, "shift-jis"),
    ):
        with pytest.raises(TextError, match="find out its encoding") as caught:
            decode(text.encode(encoding), "book.txt")
        assert "iconv -f ENCODING" in str(caught.value)


def test_surrogates_written_as_utf_8_are_named() -> None:
    """Forbids the advice to convert them from WINDOWS-1252; Java and databases write them."""
    data = "The 😀 cat.\n".encode()
    halves = "\ud83d\ude00".encode("utf-8", "surrogatepass")
    data = data.replace("😀".encode(), halves)
    with pytest.raises(TextError, match="it is CESU-8") as caught:
        decode(data, "book.txt")
    assert "byte 4 of 16 is 0xed" in str(caught.value)
    assert "uconv -f CESU-8 -t UTF-8 book.txt > book.utf-8.txt" in str(caught.value)
    # Half of a pair is damage.
    with pytest.raises(TextError) as caught:
        decode(data.replace(halves, halves[:3]), "book.txt")
    assert "CESU" not in str(caught.value)


def test_nuls_among_other_bytes_that_no_text_has_are_not_to_be_removed() -> None:
    """Forbids the advice to drop the NULs of a program, which leaves garbage."""
    for data in (b"\0asm\1\0\0\0", b"ITSF\x03\0\0\0 and more"):
        with pytest.raises(TextError, match="so no encoding reads it as text; give a text"):
            decode(data, "book.txt")


def test_texts_are_left_alone() -> None:
    for text in (
        TEXT,
        CYRILLIC,
        CHINESE,
        "",
        "%PDX",
        "BMW drives\0"[:-1],
        "GIF is a format",
        "\ufeffx",
        ESCAPED,
    ):
        assert recognize(text.encode()) is None
        assert unmarked_encoding(text.encode()) == ""
        assert decode(text.encode(), "x") == text.removeprefix("\ufeff")


def test_every_place_that_reads_a_text_names_the_file(texts: Path, tmp_path: Path) -> None:
    """Context files, query files, stdin, data sets, and texts of the evaluations."""
    data, book = gzip.compress(TEXT.encode(), mtime=0), texts / "book.txt"
    packed = tmp_path / "packed.txt"
    packed.write_bytes(data)
    generate, query = ["generate", *MODEL], ["--query", "x"]
    lines = [
        failed(*generate, book, packed, *query),
        failed(*generate, book, "--query-file", packed),
        failed("encode", *MODEL, packed, "-o", tmp_path / "x.star"),
        failed("ask", *MODEL, texts / "book.star", "--query-file", packed),
        failed("eval", "perplexity", packed, *MODEL),
    ]
    for line in lines:
        assert "packed.txt is gzip, not a text" in line, line
    assert "stdin is gzip" in failed(*generate, "-", *query, stdin=data)
    with pytest.raises(InvalidInputError, match=r"packed\.txt is gzip"):
        prose(str(packed))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_data_sets_of_other_kinds(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"samples{suffix}"
    row = json.dumps({"context": "c", "query": "café", "answers": ["a"]}, ensure_ascii=False)
    for data, said in (
        (gzip.compress(row.encode(), mtime=0), "is gzip"),
        (row.encode("utf-16"), "mark of UTF-16"),
        (row.encode("cp1252"), "iconv -f WINDOWS-1252"),
    ):
        path.write_bytes(data)
        with pytest.raises(InvalidInputError, match=re.escape(str(path))) as caught:
            read(path)
        assert said in str(caught.value)


def test_texts_of_options_are_checked(texts: Path) -> None:
    """Forbids a foreign TypeError for bytes that the terminal's encoding does not have."""
    command = ["generate", *MODEL, texts / "book.txt"]
    for option, name in (
        ("--query", "query"),
        ("--stop", "stop string"),
        ("--answer-prefix", "answer prefix"),
    ):
        line = failed(*command, "--query", "x", option, "caf\udce9")
        assert f"the {name} 'caf\\udce9' is not UTF-8; check the terminal's locale" in line


def test_an_empty_name() -> None:
    line = failed("generate", *MODEL, "", "--query", "x")
    assert line == "error: the name of a text file is empty; give its path"


def test_a_name_that_no_file_can_have() -> None:
    done = run("generate", *MODEL, "x" * 300, "--query", "x")
    assert done.status == 1
    assert "File name too long" in done.err
