"""What a command reports on stderr: warnings once, more with --verbose, nothing with --quiet."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from star_attention.cli import session
from tests.command_line import CHAT, MODEL, QUESTION, failed, ok

TINY_BLOCKS = "warning: block_size 4 makes blocks of 4 tokens"


@pytest.mark.filterwarnings("default")
def test_warnings_come_once_and_honor_quiet(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_text = session.encode_text

    def warned(*arguments: object, **more: object) -> object:
        for line in range(3):
            warnings.warn_explicit("the same", UserWarning, "some.py", line)
        return encode_text(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "encode_text", warned)
    command = ["generate", *CHAT, texts / "book.txt", "--query", QUESTION, "--max-new-tokens", "1"]
    assert ok(*command).err.count("warning: the same\n") == 1
    assert ok(*command, "--quiet").err == ""


@pytest.mark.filterwarnings("default")
def test_blocks_of_a_few_tokens_are_warned_of(texts: Path) -> None:
    """A number of blocks, as some programs take it, would score nothing without a word."""
    command = ["generate", *MODEL, texts / "more.txt", "--query", "x", "--max-new-tokens", "1"]
    assert TINY_BLOCKS in ok(*command, "--block-size", "4").err
    assert "warning" not in ok(*command, "--block-size", "64").err


def test_verbose_shows_settings_and_plan(texts: Path) -> None:
    command = ["generate", *CHAT, texts / "book.txt", "--query", QUESTION, "--max-new-tokens", "1"]
    done = ok(*command, "--verbose")
    assert "StarLLM(llama, star, block_size=256, cpu, float32)" in done.err
    assert re.search(r"^rank 0  b1 ", done.err, re.MULTILINE), "the plan"
    assert done.out == ok(*command).out
    assert "StarLLM" not in ok(*command).err


def test_the_size_of_the_file_is_said_before_encoding(texts: Path, tmp_path: Path) -> None:
    """With the smaller choice beside it. Also where progress is off."""
    command = ["encode", *CHAT, texts / "book.txt", "-o", tmp_path / "book.star"]
    lines = ok(*command).err.splitlines()
    said = next(line for line in lines if "will take" in line)
    assert lines.index(said) < next(i for i, line in enumerate(lines) if line.startswith("encoded"))
    sizes = re.findall(r"[\d.]+ [KM]iB", said)
    saved = (tmp_path / "book.star").stat().st_size
    assert float(sizes[0].split()[0]) == pytest.approx(saved / 2**20, rel=0.03)
    assert "; --kv-dtype fp8 makes it" in said
    lines = ok(*command, "--kv-dtype", "fp8").err.splitlines()
    assert f"the saved context will take about {sizes[1]}" in lines
    assert ok(*command, "--quiet").err == ""
    answer = ["--query", QUESTION, "--max-new-tokens", "1"]
    generate = ["generate", *CHAT, texts / "book.txt", *answer]
    assert "will take" not in ok(*generate).err
    assert "will take" in ok(*generate, "--save", tmp_path / "book.star").err


def test_a_full_disk_is_noticed_before_encoding(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2048))
    target = tmp_path / "book.star"
    for quiet in ([], ["-q"]):
        message = failed("encode", *CHAT, *quiet, texts / "book.txt", "-o", target)
        assert f"cannot save the context to {target}: it will take " in message
        assert "and 2.0 KiB are free there; free space or choose another place" in message
        assert "; --kv-dtype fp8 makes it " in message
    assert list(tmp_path.iterdir()) == []
