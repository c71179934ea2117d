"""Errors of the command line: one line, with a remedy, before anything slow starts."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import typer

from star_attention.cli.errors import Reporting, cli_errors
from star_attention.cli.paths import check_output_folder
from star_attention.hf.loading.load import load_tokenizer
from tests.command_line import MODEL, NEEDLE, QUESTION, failed, ok, run, usage_error
from tests.engines import BUNDLED


def test_texts_that_cannot_be_read(texts: Path, tmp_path: Path) -> None:
    command = ["generate", *MODEL, "--query", "x"]
    missing = tmp_path / "nowhere.txt"
    assert f"there is no text file {missing}; check the path" in failed(*command, missing)
    assert f"{tmp_path} is a folder" in failed(*command, tmp_path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 au lait")
    line = failed(*command, texts / "book.txt", latin)
    assert f"{latin} is not UTF-8: byte 3 of 12 is 0xe9" in line
    assert f"iconv -f WINDOWS-1252 -t UTF-8 {latin}" in line
    assert "stdin is not UTF-8: byte 0 of 2" in failed(*command, "-", stdin=b"\xff\xfe")
    assert "the query 'caf\\udce9' is not UTF-8" in failed(
        *command, texts / "book.txt", "--query", "caf\udce9"
    )
    assert "latin.txt is not UTF-8" in failed(
        "generate", *MODEL, texts / "book.txt", "--query-file", latin
    )


def test_a_saved_context_is_refused_as_text(texts: Path, tmp_path: Path) -> None:
    """Forbids the advice to convert it to UTF-8."""
    command = ["generate", *MODEL, "--query", "x"]
    message = "is a saved context, not a text; use `star-attention ask` to answer queries about it"
    assert f"book.star {message}" in failed(*command, texts / "book.star")
    assert f"stdin {message}" in failed(*command, "-", stdin=(texts / "book.star").read_bytes())
    (tmp_path / "of_ranks").mkdir()
    shutil.copy(texts / "book.star", tmp_path / "of_ranks" / "rank-0.safetensors")
    assert f"of_ranks {message}" in failed(*command, tmp_path / "of_ranks")


def test_a_byte_order_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + NEEDLE.encode())
    options = ["generate", *MODEL, "--query", QUESTION, "--max-new-tokens", "1", "--json"]
    marked = json.loads(ok(*options, tmp_path / "marked.txt").out)
    plain = json.loads(ok(*options, "-", stdin=NEEDLE).out)
    assert marked["context_tokens"] == plain["context_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-size", "4x"], "block_size '4x' is not a number of tokens; write 4096, '4k'"),
        (["--block-size", "0"], "block_size 0 is below 1"),
        (
            ["--block-size", "512", "--anchor-size", "1k"],
            "anchor_size 1024 is above block_size 512",
        ),
        (["--anchor-size", "-1"], "anchor_size -1 is negative"),
        (["--tokens-per-forward", "0"], "tokens_per_forward 0 is below 1"),
        (["--method", "magic"], "method 'magic' is unknown; choose one of star, dense"),
        (["--dtype", "int4"], "dtype 'int4' is unknown; use one of auto, float32"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["-m", "/nowhere/model"], "there is no model folder /nowhere/model"),
        (["--query", ""], "a query is empty"),
        (["--query", "  "], "a query is empty"),
        (
            ["--max-new-tokens", "4x"],
            "max_new_tokens '4x' is not a number of tokens; write 4096, '4k'",
        ),
        (["--max-new-tokens", "0"], "max_new_tokens 0 is not a positive number of tokens"),
        (["--save", "/nowhere/book.star"], "the folder /nowhere does not exist"),
        (["--save", "/tmp"], "it is a folder; give the name of a file"),
        (["--save", "/proc/book.star"], "the folder /proc is not writable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_values(texts: Path, options: list[str], message: str) -> None:
    assert message in failed("generate", *MODEL, texts / "book.txt", "--query", QUESTION, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "balanced"], "lookback 2 does not work with method 'dense'"),
        (["--second-look", "0.1"], "second_look 0.1 does not work: every token of a dense context"),
    ],
    ids=str,
)
def test_what_a_method_does_not_do_is_refused_before_a_model_is_looked_for(
    texts: Path, options: list[str], message: str
) -> None:
    command = ["generate", "-m", "/nowhere/model", texts / "book.txt", "--query", QUESTION]
    assert message in failed(*command, "--method", "dense", *options)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/proc/x/y", "No such file or directory"), ("a" * 300, "File name too long")],
    ids=["proc", "long"],
)
def test_folders_that_cannot_be_written(folder: str, reason: str, tmp_path: Path) -> None:
    """Forbids the operating system's bare `[Errno 2]`, and folders left over from trying."""
    message = f"is not writable ({reason}); give another one with --out"
    for command in (
        ["demo", "--model", BUNDLED],
        ["eval", "run", *MODEL, BUNDLED / "config.json"],
    ):
        assert message in failed(*command, "--out", folder)
    check_output_folder(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_operating_system_are_in_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(typer.Exit), cli_errors(Reporting()):
        (tmp_path / "no").read_text()
    expected = f"error: cannot use '{tmp_path / 'no'}': No such file or directory; check the path"
    assert capsys.readouterr().err.startswith(expected)
    with pytest.raises(typer.Exit), cli_errors(Reporting()):
        raise OSError(errno.ENOSPC, "No space left on device")
    expected = "error: No space left on device; check the paths, permissions and free space\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--method", "start"], "method 'start' is unknown"),
        (
            ["--dtype", "fp32"],
            "dtype 'fp32' is unknown; use one of auto, float32, bfloat16, float16",
        ),
        (["--device", "gpu"], "device 'gpu' is unknown; use auto, cpu, cuda or cuda:1"),
        (["--device", "cuda1"], "device 'cuda1' is unknown; use auto, cpu, cuda or cuda:1"),
        (["--max-new-tokens", "0"], "max_new_tokens 0 is not a positive number of tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cheap_mistakes_are_found_before_the_model_is_loaded(
    texts: Path, option: list[str], message: str
) -> None:
    commands = [["generate", *MODEL, texts / "book.txt"]]
    if option[0] != "--method":
        commands.append(["ask", *MODEL, texts / "book.star"])
    for command in commands:
        done = run(*command, "--query", QUESTION, *option)
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith(f"error: {message}"), "and not `loading`"


def test_broken_models_and_empty_texts(texts: Path, tmp_path: Path) -> None:
    query = ["--query", QUESTION]
    assert "holds no config.json" in failed("generate", "-m", tmp_path, texts / "book.txt", *query)
    for chat in ([], ["--chat"]):
        assert "the text of - is empty" in failed("generate", *MODEL, "-", *query, *chat, stdin="")
    (tmp_path / "blank").write_text("\n \n")
    assert "has no queries" in failed(
        "generate", *MODEL, texts / "book.txt", "--query-file", tmp_path / "blank"
    )


def test_models_without_tokenizer_or_template(texts: Path, tmp_path: Path) -> None:
    """The remedies are those of the command line, not of Python."""
    for file in (BUNDLED / "config.json", *BUNDLED.glob("model*")):
        (tmp_path / file.name).symlink_to(file)
    bare = ["-m", tmp_path, "--dtype", "float32", "--query", QUESTION]
    message = f"the model at {tmp_path} has no tokenizer, which text input needs; copy its files"
    assert message in failed("generate", *bare, texts / "book.txt")
    assert message in failed("ask", *bare, texts / "book.star")
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    line = failed("generate", *bare, texts / "book.txt", "--chat")
    assert line == "error: this model has no chat template; leave out --chat"


def test_a_context_beyond_the_models_positions(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "long.txt").write_text("a 1 " * 33000)
    line = failed("encode", *MODEL, tmp_path / "long.txt", "-o", tmp_path / "long.star")
    assert "more than the model's 65,536 positions" in line
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def test_saved_contexts_that_cannot_be_used(texts: Path, tmp_path: Path) -> None:
    ask = ["ask", *MODEL, "--query", QUESTION]
    assert "there is no saved context at" in failed(*ask, tmp_path / "none.star")
    assert "book.txt is not a saved context: it does not begin like one" in failed(
        *ask, texts / "book.txt"
    )
    whole = (texts / "book.star").read_bytes()
    (tmp_path / "short.star").write_bytes(whole[: len(whole) // 2])
    assert "short.star cannot be read as a saved context" in failed(*ask, tmp_path / "short.star")
    line = failed(
        "ask", "-m", BUNDLED, "--dtype", "bfloat16", texts / "book.star", "--query", QUESTION
    )
    assert (
        "it differs in dtype: float32 in the context, bfloat16 as asked for; leave out --dtype, or"
        " encode the context again" in line
    )


def test_usage_errors_have_status_2(texts: Path) -> None:
    book, query = texts / "book.txt", ["--query", "x"]
    assert "Missing argument" in usage_error("generate", *MODEL, *query)
    assert "--model" in usage_error("generate", book, *query)
    assert "give a query" in usage_error("generate", *MODEL, book)
    assert "--temperatur" in usage_error("generate", *MODEL, book, *query, "--temperatur", "1")
    for option, value in (
        ("--top-p", "1.5"),
        ("--temperature", "-1"),
        ("--top-k", "x"),
        ("--stall-limit", "0.5"),
    ):
        message = usage_error("generate", *MODEL, book, *query, option, value)
        assert option in message
        shows_value = re.search(f"[ ']{re.escape(value)}", message)
        assert shows_value, "the value, whatever the version of typer"
    for option in ("--top-p", "--repetition-penalty"):
        assert f"'{option}': 0 is not above 0" in usage_error(
            "generate", *MODEL, book, *query, option, "0"
        )
    assert "stdin) can be read only once" in usage_error("generate", *MODEL, "-", "-", *query)
    assert "stdin already provides the text" in usage_error(
        "generate", *MODEL, "-", "--query-file", "-"
    )
    assert "--output" in usage_error("encode", *MODEL, book)
    assert "No such command" in usage_error("guess")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("generate", *MODEL, tmp_path / "none.txt", "--query", "x", "--debug")
    assert done.status == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: there is no text file")
