"""Terminals, pipes, closed streams and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from star_attention.storage import writing
from tests.command_line import CHAT, MODEL, NOISE, QUESTION, Done, failed, run, start
from tests.warm import python


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(60 * NOISE, encoding="utf-8")
    terminal, inside = pty.openpty()
    shown = b""
    try:
        options = [*CHAT, "--tokens-per-forward", "256", tmp_path / "long.txt"]
        options += ["-o", tmp_path / "long.star"]
        process = subprocess.Popen(
            python("-m", "star_attention", "encode", *options),
            stdout=subprocess.PIPE,
            stderr=inside,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        )
        os.close(inside)
        # Reading fails once the other side of the terminal is closed.
        with contextlib.suppress(OSError):
            while part := os.read(terminal, 4096):
                shown += part
        assert process.wait(timeout=60) == 0
    finally:
        os.close(terminal)
    assert process.stdout is not None
    process.stdout.close()
    text = shown.decode()
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in text, "the bar"
    assert re.search(r"block \d+ of \d+, [\d,]+ of [\d,]+ tok", text)
    assert not re.search(r"^encoded [\d,]+ of", text, re.MULTILINE), "no plain lines"
    assert (tmp_path / "long.star").exists()


def test_an_answer_is_streamed(texts: Path) -> None:
    """Its first words are printed long before it ends."""
    options = ["--query", QUESTION, "--max-new-tokens", "4k", "--ignore-eos"]
    process = start("ask", *MODEL, texts / "book.star", *options)
    assert process.stdout is not None
    try:
        assert os.read(process.stdout.fileno(), 4)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_ctrl_c_during_imports() -> None:
    """Runs the installed script."""
    code = """
import sys
from importlib.metadata import entry_points
class Interrupted:
    def find_spec(self, name, *_):
        if name == "star_attention.cli.generate":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.argv = ["star-attention", "generate", "--help"]
(script,) = entry_points(group="console_scripts", name="star-attention")
script.load()()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == ""


def test_ctrl_c_while_encoding_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(400 * NOISE, encoding="utf-8")
    options = [*CHAT, "--tokens-per-forward", "256", tmp_path / "long.txt"]
    options += ["-o", tmp_path / "long.star"]
    process = start("encode", *options)
    assert process.stderr is not None
    lines = []
    while not lines or not lines[-1].startswith("encoded "):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def test_ctrl_c_while_saving_keeps_the_previous_file(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "book.star"
    shutil.copy(texts / "book.star", target)

    def interrupted(*arguments: Any, **more: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "save_file", interrupted)
    done = run("encode", *CHAT, texts / "book.txt", "-o", target)
    assert done.status == 130
    assert done.err.splitlines()[-1] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["book.star"]
    assert target.read_bytes() == (texts / "book.star").read_bytes()


def test_other_files_are_never_replaced(texts: Path, tmp_path: Path) -> None:
    """A typing error in the output's name must not overwrite the text."""
    text = tmp_path / "book.txt"
    shutil.copy(texts / "book.txt", text)
    for arguments in (["encode", "-o", text], ["generate", "--query", QUESTION, "--save", text]):
        assert "a file of another kind" in failed(arguments[0], *CHAT, text, *arguments[1:])
        assert text.read_bytes() == (texts / "book.txt").read_bytes()


@pytest.mark.parametrize(
    "option",
    [
        ["--stop", ""],
        ["--seed", "9" * 23],
        ["--max-new-tokens", "64k"],
        ["--query", "x", "--max-new-tokens", "64k"],
    ],
)
def test_settings_are_checked_before_the_text_is_encoded(texts: Path, option: list[str]) -> None:
    done = run("generate", *CHAT, texts / "book.txt", "--query", QUESTION, *option)
    assert done.status == 1
    assert "loading" in done.err
    assert "encoded" not in done.err


def test_a_reader_that_closes_the_pipe_is_not_an_error(texts: Path) -> None:
    process = start("ask", *MODEL, texts / "book.star", "--query", QUESTION)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert "Broken" not in err
    assert "Traceback" not in err


def through_a_shell(redirection: str, *arguments: str | Path, **env: str) -> Done:
    """Run a command in a shell that redirects its streams, in a fresh process."""
    command = [sys.executable, "-m", "star_attention", *map(str, arguments)]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_closed_streams(bare_config: Path, texts: Path, tmp_path: Path) -> None:
    """Cron and daemons close them. Forbids an AttributeError of None."""
    plan = ["plan", "-m", bare_config, "--context", "8k"]
    assert through_a_shell(">&-", *plan) == Done(0, "", "")
    assert through_a_shell("<&- >&- 2>&-", *plan) == Done(0, "", "")
    done = through_a_shell("<&-", "generate", *CHAT, "-", "--query", "x")
    assert (done.status, done.err) == (1, "error: the text of - is empty; give at least one word\n")
    done = through_a_shell("<&-", "ask", *MODEL, texts / "book.star")
    assert done.status == 2
    assert "give a query" in done.err
    done = through_a_shell(
        ">&- 2>&-", "encode", *CHAT, texts / "book.txt", "-o", tmp_path / "book.star"
    )
    assert done.status == 0
    assert (tmp_path / "book.star").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full does not exist")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_on_a_full_disk(bare_config: Path, unbuffered: str) -> None:
    """Forbids the system's bare error, and Python's complaint at exit."""
    message = (
        "error: cannot write to standard output (No space left on device);"
        " free some space, or redirect it\n"
    )
    for arguments in (["plan", "-m", bare_config, "--context", "8k"], ["--version"]):
        done = through_a_shell(">/dev/full", *arguments, PYTHONUNBUFFERED=unbuffered)
        assert done == Done(1, "", message)
