"""Texts that are none, or have half a character, are refused wherever they come in."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import star_attention
from star_attention import StarLLM
from star_attention.errors import InvalidInputError, TextError, TokenError
from star_attention.evals.formats.files import read
from star_attention.files.kinds import recognize
from star_attention.hf.text.checks import checked_text
from tests.engines import bundled_tokenizer, text_model
from tests.refusals import refused

LONE = "abc \ud83d def"
PAIR = "abc \ud83d\ude00 def"


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16)


CALLS: dict[str, Callable[[StarLLM, str], Any]] = {
    "context": lambda star, text: star.encode(text),
    "context of several": lambda star, text: star.encode(["abc", text]),
    "query": lambda star, text: star.generate(star.encode("abc"), text, max_new_tokens=1),
    "query prepared": lambda star, text: star.prepare("abc", text),
    "query of several": lambda star, text: star.generate(
        star.encode("abc"), ["abc", text], max_new_tokens=1
    ),
    "query streamed": lambda star, text: list(
        star.stream(star.encode("abc"), text, max_new_tokens=1)
    ),
    "query continued": lambda star, text: star.logits(star.encode("abc"), text),
    "extension": lambda star, text: star.extend(star.encode("abc"), text),
    "stop string": lambda star, text: star.check_settings(stop=[text]),
    "answer prefix": lambda star, text: star.generate(
        star.encode("abc"), "abc", answer_prefix=text, max_new_tokens=1
    ),
    "query in a pipeline": lambda star, text: star_attention.pipeline(star)(
        "abc", question=text, chat=False, max_new_tokens=1
    ),
    "message 1 of 1": lambda star, text: star.encode([{"role": "user", "content": text}]),
    "query in a chat": lambda star, text: star.generate(
        star.encode([{"role": "user", "content": "abc\n"}]), text, max_new_tokens=1
    ),
    "extension of a chat": lambda star, text: star.extend(
        star.encode([{"role": "user", "content": "abc\n"}]), text
    ),
    "context in a pipeline": lambda star, text: star_attention.pipeline(star)(
        text, question="abc", chat=False, max_new_tokens=1
    ),
}


@pytest.mark.parametrize("place", CALLS)
def test_half_a_character(star: StarLLM, place: str) -> None:
    """Forbids the tokenizer's own TypeError, which says nothing of the text."""
    name = place.split()[0]
    refused(
        TextError,
        f"{name}",
        "has a lone surrogate (half a character), U+D83D, at offset 4 of 9",
        'text.encode("utf-8", "replace").decode()',
        call=lambda: CALLS[place](star, LONE),
    )
    # The remedy works.
    CALLS[place](star, LONE.encode("utf-8", "replace").decode())


@pytest.mark.parametrize("place", CALLS)
def test_a_pair_of_surrogates_is_its_character(star: StarLLM, place: str) -> None:
    CALLS[place](star, PAIR)


def test_pairs_have_the_characters_ids(star: StarLLM) -> None:
    whole = star.encode("abc 😀 def").token_ids.tolist()
    assert star.encode(PAIR).token_ids.tolist() == whole
    assert star.prepare("abc", PAIR).prompts == star.prepare("abc", "abc 😀 def").prompts


def test_offsets_are_the_texts_own() -> None:
    assert checked_text("\ud83d\ude00" * 3, "text") == "😀" * 3
    with pytest.raises(TextError, match=r"U\+DC80, at offset 5 of 7"):
        checked_text("😀\ud83d\ude00ab\udc80x", "text")


def test_other_characters_are_text(star: StarLLM) -> None:
    """Control characters, private and unassigned ones pass as they are."""
    text = "a\x01b\ufeff\ue000\uffff\u0378c"
    ids = star.encode(text).token_ids.tolist()
    assert star.tokenizer.decode(ids, skip_special_tokens=True) == text


# ------------------------------------------------------------------ files of another kind


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "The tea is hot.")
    return buffer.getvalue()


# How a file was read by mistake, what it is, and a word of the remedy.
MISREAD = {
    "pdf": ("%PDF-1.7\n1 0 obj", "a PDF", "read_document(path)"),
    "pdf in pieces": (b"%PDF-1.4\n%\xe2\xe3".decode("utf-8", "replace"), "a PDF", "read_document"),
    "docx": (zipped("word/document.xml").decode("latin-1"), "a Word document", "read_document"),
    "zip": (zipped("a.txt").decode("latin-1"), "a zip archive", "unzip -p FILE > FILE.txt"),
    "docx in pieces": (
        zipped("word/document.xml").decode("utf-8", "ignore")[:90],
        "a zip archive, Word file or EPUB",
        "read_document",
    ),
    "gzip": (gzip.compress(b"tea", mtime=0).decode("latin-1"), "gzip", "gunzip -c FILE > FILE.txt"),
    "png": (b"\x89PNG\r\n\x1a\n\0".decode("latin-1"), "a PNG image", "OCR"),
    "utf-16": ("tea is hot".encode("utf-16").decode("latin-1"), "10 NUL", 'encoding="utf-16"'),
    "utf-16-be": ("tea is".encode("utf-16-be").decode(), "6 NUL characters", 'encoding="utf-16"'),
    "nul": ("tea\0 is hot", "1 NUL character, the first at offset 3 of 11", ".replace("),
}
# These are of the caller's own making.
TEXTS = [place for place in CALLS if place not in ("stop string", "answer prefix")]


@pytest.mark.parametrize("kind", MISREAD)
def test_what_is_no_text_is_named(star: StarLLM, kind: str) -> None:
    """Forbids a context of a file's bytes, without a word."""
    text, name, remedy = MISREAD[kind]
    refused(TextError, "context", name, remedy, call=lambda: star.encode(text))


@pytest.mark.parametrize("place", TEXTS)
@pytest.mark.parametrize("kind", ["pdf", "nul"])
def test_what_is_no_text_is_named_wherever_it_comes_in(
    star: StarLLM, place: str, kind: str
) -> None:
    text, name, _ = MISREAD[kind]
    refused(TextError, place.split()[0], name, call=lambda: CALLS[place](star, text))


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (b"The tea is hot.", "got bytes; decode them, for example with data.decode()"),
        (bytearray(b"tea"), "got bytearray; decode them"),
        (b"%PDF-1.7\n", "they are a PDF: give star_attention.read_document(path)"),
        (gzip.compress(b"tea", mtime=0), "they are gzip: convert it first"),
    ],
)
def test_bytes_are_named(star: StarLLM, data: bytes, remedy: str) -> None:
    refused(TokenError, "context", remedy, call=lambda: star.encode(data))  # type: ignore[arg-type]
    refused(TokenError, "query", remedy, call=lambda: star.generate(star.encode("abc"), data))  # type: ignore[arg-type]


def test_texts_about_files_are_texts(star: StarLLM) -> None:
    """Forbids a text that is taken for a file because of its first word."""
    for text in (
        "GGUF is a file format.",
        "ID3 tags name songs.",
        "PAR1 begins a table.",
        "OggS and fLaC are marks.",
        "RIFF and WAVE are marks.",
        "safeftyp is no word.",
        "%PDF- begins a PDF.",
        "{\\rtf} is a word.",
        "PK\tname\n",
    ):
        assert star.encode(text).token_ids.tolist() == star.tokenizer(text).input_ids
        assert recognize(text.encode()) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"context": "a\0b"}, "line 1: .*context of sample .* has 1 NUL character.*remove"),
        ({"query": "%PDF-1.5"}, r"line 1: .*query of sample .* is a PDF.*read_document"),
    ],
)
def test_data_sets_name_the_line(tmp_path: Path, line: dict[str, str], message: str) -> None:
    row = {"context": "c", "query": "q", "answers": ["x"], **line}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=message):
        read(path)
