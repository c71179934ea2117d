"""Messages end in logs and bug reports: none repeats more than 80 characters of a user's text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import star_attention
from star_attention.errors import QUOTED_CHARACTERS, StarAttentionError, quote, quote_path
from star_attention.evals.formats.files import read
from tests.command_line import MODEL, failed
from tests.engines import bundled_tokenizer, text_model

# No run of it repeats, and it is too long for a file name.
SECRET = " ".join(f"patient {number} has a cough." for number in range(100, 400))


def leak(message: str) -> str:
    """Return the longest part of `SECRET` that a message repeats, where it is too long."""
    for start in range(len(message) - QUOTED_CHARACTERS):
        part = message[start : start + QUOTED_CHARACTERS + 1]
        if part in SECRET:
            return part
    return ""


def test_a_leak_is_seen() -> None:
    assert leak(f"error: {SECRET[40:121]!r}")
    assert not leak(f"error: {SECRET[40:120]!r}")


def test_values_are_quoted_in_part() -> None:
    assert quote("a'b") == '"a\'b"'
    assert quote("x" * 80) == repr("x" * 80)
    assert quote("x" * 1081) == repr("x" * 80) + "... (1,081 characters)"
    assert quote(["x" * 200]) == "['" + "x" * 80 + "..."
    assert quote(4096) == "4096"


def test_paths_that_may_be_texts_are_quoted_from_their_end(tmp_path: Path) -> None:
    assert quote_path(Path("/data/book.txt")) == "/data/book.txt"
    file = tmp_path / ("long" * 30) / "book.txt"
    assert quote_path(file) != str(file)
    file.parent.mkdir()
    assert quote_path(file) == str(file)
    assert quote_path(file.parent / SECRET) == "..." + SECRET[-80:]
    assert quote_path("a/" * 50 + "book.txt") == "..." + ("a/" * 50 + "book.txt")[-80:]


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "a list of texts in a pipeline": lambda star, _: star_attention.pipeline(star)(
        [SECRET, SECRET],  # type: ignore[arg-type]
        "What is it?",
    ),
    "a list as content": lambda star, _: star.encode([{"role": "user", "content": [SECRET]}]),
    "a part without text": lambda star, _: star.encode(
        [{"role": "user", "content": [{"type": "text", "body": SECRET}]}]
    ),
    "a text as role": lambda star, _: star.generate(
        star.encode([{"role": "user", "content": "x"}]), [{"role": SECRET, "content": "x"}]
    ),
    "a text in a set": lambda star, _: star.encode({SECRET}),
    "a text among ids": lambda star, _: star.encode([5, SECRET]),
    "a text as model": lambda *_: star_attention.StarLLM.from_pretrained(SECRET),
    "a text as size": lambda star, _: star.with_config(block_size=SECRET),
    "a text as saved context": lambda star, _: star.load_context(SECRET),
    "a text as target": lambda star, _: star.encode("x").save(SECRET),
    "texts as stop strings": lambda star, _: star.generate(star.encode("x"), "y", stop=[[SECRET]]),
    "a text as number of tokens": lambda star, _: star.generate(
        star.encode("x"), "y", max_new_tokens=SECRET
    ),
    "a text as seed": lambda star, _: star.generate(star.encode("x"), "y", seed=SECRET),
    "a text as temperature": lambda star, _: star.generate(
        star.encode("x"), "y", temperature=SECRET
    ),
    "a text as prefix": lambda star, _: star.generate(
        star.encode("x"), "y", answer_prefix=[SECRET]
    ),
    "a context of words": lambda *_: read_row({"context": [SECRET], "query": "q", "answers": "a"}),
    "answers that are objects": lambda *_: read_row(
        {"context": "c", "query": "q", "answers": [{"text": SECRET}]}
    ),
    "a text as meta": lambda *_: read_row(
        {"context": "c", "query": "q", "answers": ["a"], "meta": SECRET}
    ),
}


def read_row(row: dict[str, Any]) -> Any:
    """Write a data set with a row, and read it."""
    path = Path("samples.jsonl")
    path.write_text(json.dumps(row), encoding="utf-8")
    return read(path)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_errors_do_not_repeat_the_text(
    call: Callable[[Any, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    star = star_attention.StarLLM(text_model(), bundled_tokenizer(), block_size=20)
    with pytest.raises((StarAttentionError, TypeError, AttributeError)) as caught:
        call(star, tmp_path)
    assert isinstance(caught.value, StarAttentionError), caught.value
    assert not leak(str(caught.value))


def test_a_text_in_place_of_its_file() -> None:
    """Forbids an error that repeats a document given as an argument."""
    for argument in (SECRET, SECRET[:150]):
        line = failed("generate", *MODEL, argument, "--query", "x")
        assert not leak(line)
