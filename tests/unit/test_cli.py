"""The command line, run for real with the bundled model on a text of some hundred tokens."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from star_attention.cli import app, docs, output
from star_attention.cli.formatting import format_seconds
from star_attention.cli.streams import say
from star_attention.config import MAX_NEW_TOKENS
from star_attention.demo.settings import DemoSettings
from star_attention.hf.loading.load import load_tokenizer
from star_attention.storage import saving
from tests.engines import BUNDLED

NOISE = "The hill is tall and the road is long.\nA cold wind comes down from the north.\nThere is bread on the table.\n"
NEEDLE = "The secret number for torpidity-kill is 4910508.\n"
OTHER = "The secret number for lyric-known is 8081780.\n"
QUESTION = "What is the secret number for torpidity-kill?"
OTHER_QUESTION = "What is the secret number for lyric-known?"
MODEL = ["-m", BUNDLED, "--dtype", "float32"]
CHAT = [*MODEL, "--chat", "--block-size", "256"]


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Done:
    """Run the command line in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def ok(*arguments: str | Path, stdin: str | bytes | None = None) -> Done:
    done = run(*arguments, stdin=stdin)
    assert done.status == 0, done.err
    return done


def failed(*arguments: str | Path, stdin: str | bytes | None = None) -> str:
    """The one line that an error of ours is."""
    done = run(*arguments, stdin=stdin)
    assert done.status == 1, done
    assert done.out == ""
    lines = done.err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line or line.startswith("error: ") for line in lines[:-1])
    return lines[-1]


def misused(*arguments: str | Path) -> str:
    done = run(*arguments)
    assert done.status == 2, done
    return " ".join(done.err.replace("│", " ").split())


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Run the command line in a process of its own, with Ctrl-C as a shell would leave it."""
    return subprocess.Popen(
        [sys.executable, "-m", "star_attention", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `book.txt` (one needle), `more.txt` (another), and the book encoded as `book.star`."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "book.txt").write_text(8 * NOISE + NEEDLE + 8 * NOISE, encoding="utf-8")
    (folder / "more.txt").write_text(4 * NOISE + OTHER + 4 * NOISE, encoding="utf-8")
    ok("encode", *CHAT, folder / "book.txt", "-o", folder / "book.star", "--quiet")
    return folder


# ------------------------------------------------------------------ generate


def test_generate_answers_on_stdout_and_tells_the_rest_on_stderr(texts: Path) -> None:
    done = ok("generate", *CHAT, texts / "book.txt", "--query", QUESTION)
    assert done.out == "The secret number for torpidity-kill is 4910508\n"
    loading, *_, progress, summary = done.err.splitlines()
    assert loading == f"loading {BUNDLED}"
    assert progress == "encoded 567 of 567 tok, block 3 of 3"
    times = r"encode [\d.]+ s, first token [\d.]+ s, \d+ tok/s"
    assert re.fullmatch(f"context 567 tok, 3 blocks x 256, anchor 256, {times}", summary)


def test_quiet_says_nothing(texts: Path) -> None:
    assert ok("generate", *CHAT, texts / "book.txt", "--query", QUESTION, "-q").err == ""


def test_json_has_exactly_the_fields(texts: Path) -> None:
    done = ok(
        "generate", *CHAT, texts / "book.txt", "--query", QUESTION, "--anchor-size", "128", "--json"
    )
    (line,) = done.out.splitlines()
    reply = json.loads(line)
    assert list(reply) == [
        *(
            "query",
            "text",
            "token_ids",
            "finish_reason",
            "method",
            "context_tokens",
            "query_tokens",
            "block_size",
        ),
        *(
            "anchor_size",
            "blocks",
            "ranks",
            "tensor_parallel",
            "encode_s",
            "ttft_s",
            "tokens_per_s",
            "peak_bytes",
        ),
        *("wire_bytes_phase1", "wire_bytes_phase2", "wire_calls_phase1", "wire_calls_phase2"),
        *("wire_within_bytes_phase1", "wire_within_bytes_phase2", "per_rank"),
    ]
    assert list(reply) == list(output.FIELDS)
    assert reply["query"] == QUESTION
    assert reply["text"].endswith("4910508")
    assert reply["token_ids"][-1] == 2
    assert reply["finish_reason"] == "stop"
    assert (reply["method"], reply["context_tokens"], reply["query_tokens"]) == ("star", 567, 16)
    assert (reply["block_size"], reply["anchor_size"], reply["blocks"], reply["ranks"]) == (
        256,
        128,
        3,
        1,
    )
    assert min(reply["encode_s"], reply["ttft_s"], reply["tokens_per_s"]) > 0
    assert reply["peak_bytes"] is None
    assert (
        reply["wire_bytes_phase1"]
        == reply["wire_bytes_phase2"]
        == reply["wire_within_bytes_phase1"]
        == 0
    )
    (rank,) = reply["per_rank"]
    assert rank == {"tokens": 567, "encode_s": reply["encode_s"], "peak_bytes": None}


def test_raw_text_is_not_a_chat(texts: Path) -> None:
    """Without --chat the query follows the text as it is."""
    prefix = "<|q|>" + QUESTION + "<|a|>The secret number for torpidity-kill is "
    done = ok(
        "generate",
        *MODEL,
        texts / "book.txt",
        "--query",
        prefix,
        "--method",
        "dense",
        "--no-stream",
    )
    assert done.out.strip() == "4910508"
    assert "context 567 tok, dense, encode " in done.err


def test_several_files_and_stdin_are_joined_in_order(texts: Path) -> None:
    """The parts are joined with a line break: the same tokens as one file that holds them so."""
    book = (texts / "book.txt").read_text(encoding="utf-8")
    whole = book + "\n" + OTHER + "\n" + (texts / "more.txt").read_text(encoding="utf-8")
    options = [*CHAT, "--query", OTHER_QUESTION, "--json"]
    parts = ok("generate", *options, texts / "book.txt", "-", texts / "more.txt", stdin=OTHER)
    joined = ok("generate", *options, "-", stdin=whole)
    fields = "text", "context_tokens", "token_ids"
    assert [json.loads(parts.out)[f] for f in fields] == [json.loads(joined.out)[f] for f in fields]
    assert "8081780" in json.loads(parts.out)["text"]


def test_queries_one_after_another_and_as_a_batch(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "queries").write_text(f"\n{OTHER_QUESTION}\r\n\n", encoding="utf-8")
    options = [*CHAT, texts / "book.txt", texts / "more.txt", "--query", QUESTION]
    options += ["--query-file", tmp_path / "queries"]
    first, second = (
        "The secret number for torpidity-kill is 4910508",
        "The secret number for lyric-known is 8081780",
    )
    in_order = ok("generate", *options)
    assert in_order.out == f"> {QUESTION}\n{first}\n\n> {OTHER_QUESTION}\n{second}\n"
    assert [line.startswith("context 8") for line in in_order.err.splitlines()[-2:]] == [
        True,
        False,
    ]
    at_once = ok("generate", *options, "--batch", "--json")
    assert [json.loads(line)["text"] for line in at_once.out.splitlines()] == [first, second]
    assert "batch of 2, first token" in at_once.err


def test_queries_from_stdin(texts: Path) -> None:
    done = ok("generate", *CHAT, texts / "book.txt", "--query-file", "-", stdin=QUESTION + "\n")
    assert done.out.endswith("4910508\n")


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (
            ["--max-new-tokens", "3"],
            lambda a, b: a["finish_reason"] == "length" and len(a["token_ids"]) == 3,
        ),
        (["--stop", "torp", "--stop", "for"], lambda a, b: a["text"] == "The secret number "),
        (["--ignore-eos", "--max-new-tokens", "24"], lambda a, b: len(a["token_ids"]) == 24),
        (["--temperature", "30", "--seed", "1", "--max-new-tokens", "9"], lambda a, b: a == b),
        (
            ["--num-beams", "2"],
            lambda a, b: a["text"].endswith("4910508") and a["tokens_per_s"] is None,
        ),
        (["--top-k", "1"], lambda a, b: a["text"].endswith("4910508")),
        (["--greedy", "--repetition-penalty", "1.0"], lambda a, b: a["text"].endswith("4910508")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_answer_options(texts: Path, options: list[str], check: Callable[[Any, Any], bool]) -> None:
    times = "ttft_s", "tokens_per_s"
    command = [
        "ask",
        *MODEL,
        texts / "book.star",
        "--query",
        QUESTION,
        "--query",
        QUESTION,
        "--json",
        *options,
    ]
    first, second = map(json.loads, ok(*command).out.splitlines())
    if options[0] == "--temperature":
        first, second = (
            {k: v for k, v in reply.items() if k not in times} for reply in (first, second)
        )
        assert (
            first["text"] != "The secret number for torpidity-kill is 4910508"[: len(first["text"])]
        )
    assert check(first, second)


@pytest.mark.filterwarnings("default")
def test_greedy_wins_and_says_what_it_drops(texts: Path) -> None:
    done = ok(
        "ask",
        *MODEL,
        texts / "book.star",
        "--query",
        QUESTION,
        "--greedy",
        "--top-p",
        "0.5",
        "--top-k",
        "3",
    )
    assert done.out.endswith("4910508\n")
    assert done.err.count("warning: --top-p, --top-k ignored: --greedy was given\n") == 1
    done = ok(
        "generate", *CHAT, texts / "book.txt", "--query", QUESTION, "--greedy", "--top-k", "3"
    )
    assert done.err.count("--greedy was given") == 1


# ------------------------------------------------------------------ encode, ask


def test_encode_and_ask(texts: Path, tmp_path: Path) -> None:
    done = ok("encode", *CHAT, texts / "book.txt", "-o", tmp_path / "book.star")
    assert done.out == ""
    *_, summary, where = done.err.splitlines()
    assert summary.startswith("context 567 tok, 3 blocks x 256, anchor 256, encode ")
    assert summary.endswith(" s, 5.5 MiB of keys and values")
    assert where.startswith(f"saved to {tmp_path / 'book.star'} (5.6 MiB)")
    # Precision, method, sizes and the chat are the file's.
    done = ok("ask", "-m", BUNDLED, tmp_path / "book.star", "--query", QUESTION)
    assert done.out == "The secret number for torpidity-kill is 4910508\n"
    assert done.err.splitlines()[-1].startswith(
        "context 567 tok, 3 blocks x 256, anchor 256, first token "
    )


def test_generate_saves_what_ask_reads(texts: Path, tmp_path: Path) -> None:
    options = [*MODEL, "--chat", "--method", "dense", texts / "book.txt", "--query", QUESTION]
    answer = ok("generate", *options, "--save", tmp_path / "book.star").out
    again = ok("ask", "-m", BUNDLED, tmp_path / "book.star", "--query", QUESTION, "--json")
    assert json.loads(again.out)["text"] + "\n" == answer
    assert json.loads(again.out)["method"] == "dense"


def test_ask_prompts_on_a_terminal(texts: Path) -> None:
    """A query that cannot be answered does not end the conversation."""
    room = 65536 - 567 - 20  # for a question of 20 tokens
    too_long = f"{QUESTION} {OTHER_QUESTION}"
    terminal, inside = pty.openpty()
    try:
        process = start("ask", *MODEL, texts / "book.star", "--max-new-tokens", room, stdin=inside)
        os.write(terminal, f"{QUESTION}\n{too_long}\n{OTHER_QUESTION}\n\n".encode())
        out, err = process.communicate(timeout=60)
    finally:
        os.close(terminal)
        os.close(inside)
    assert process.returncode == 0, err
    first, second = out.splitlines()  # stdout is no terminal here, so the prompts are not in it
    assert first == "The secret number for torpidity-kill is 4910508"
    assert second.startswith("The secret number for lyric-known is ")
    assert "an empty line or Ctrl-D ends\n? context 567 tok" in err
    assert f"error: context (567), query and answer ({room:,}) need 65,5" in err


def test_ask_without_a_terminal_needs_a_query(texts: Path) -> None:
    assert "--query or --query-file: give a query" in misused("ask", *MODEL, texts / "book.star")


# ------------------------------------------------------------------ plan


@pytest.fixture
def bare_config(tmp_path: Path) -> Path:
    """A model folder with nothing but its config."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(BUNDLED) / "config.json").read_bytes())
    return folder


def test_plan_needs_no_weights(bare_config: Path) -> None:
    done = ok("plan", "-m", bare_config, "--context", "32k", "--ranks", "2")
    assert done.err == ""
    assert done.out.startswith("context 32,768 tok, 4 blocks x 8k, anchor 8k, 2 ranks\nrank 0  b0 ")
    assert "rank 1  b3   |AAAA" in done.out
    assert "17,309,568 parameters of 2 bytes, 10 layers" in done.out
    for word in (
        "weights",
        "keys and values",
        "working memory",
        "star",
        "dense",
        "official",
        "x 1.50",
        "phase 2",
    ):
        assert word in done.out


def test_plan_as_json(bare_config: Path) -> None:
    sizes = ["--context", "16k", "--block-size", "4k", "--anchor-size", "1k", "--dtype", "float32"]
    plan = json.loads(ok("plan", "-m", bare_config, *sizes, "--json", "--queries", "3").out)
    assert (plan["context_tokens"], plan["block_size"], plan["anchor_size"]) == (16384, 4096, 1024)
    assert (plan["blocks"], plan["ranks"], plan["queries"], plan["answer_tokens"]) == (
        4,
        1,
        3,
        MAX_NEW_TOKENS,
    )
    memory, flops = plan["memory"], plan["flops"]
    assert memory["weights"] == 4 * 17_309_568
    assert memory["kv"] == 16384 * plan["kv_bytes_per_token"] == 16384 * 10 * 2 * 2 * 64 * 4
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert (
        flops["phase1_star"]["linear"]
        == flops["phase1_dense"]["linear"]
        < flops["phase1_official"]["linear"]
    )
    assert (
        plan["dense_over_star"]
        == flops["phase1_dense"]["total"] / flops["phase1_star"]["total"]
        > 1
    )


def test_plan_tells_the_memory_of_each_rank(bare_config: Path) -> None:
    sizes = ["-m", bare_config, "--context", "32k", "--block-size", "4k", "--ranks", "3"]
    plan = json.loads(ok("plan", *sizes, "--json").out)
    first, second, third = plan["memory_by_rank"]
    block = 4096 * plan["kv_bytes_per_token"]
    assert second - first == block  # three blocks each, and the anchor beside them
    assert third < second
    assert plan["memory"]["total"] == max(first, second, third)
    assert re.search(
        r"fullest device \(rank \d; total of the others: [\d.]+ \w+ to [\d.]+ \w+\)",
        ok("plan", *sizes).out,
    )
    alike = ok("plan", "-m", bare_config, "--context", "32k", "--block-size", "4k").out
    assert "fullest" not in alike


@pytest.mark.filterwarnings("default")
def test_plan_warns_of_what_would_not_run(bare_config: Path) -> None:
    err = ok("plan", "-m", bare_config, "--context", "64k", "--ranks", "8").err
    assert (
        "warning: context, query and answer need 65,856 positions, but the model has 65,536" in err
    )
    assert (
        "warning: 4 of 8 ranks are idle: the context has 4 blocks; lower --block-size or --ranks\n"
        in err
    )
    err = ok("plan", "-m", bare_config, "--context", "1k", "--ranks", "2").err
    assert (
        err
        == "warning: 1 of 2 ranks is idle: the context has 1 block; lower --block-size or --ranks\n"
    )


def test_plan_names_a_model_that_cannot_run(bare_config: Path) -> None:
    (bare_config / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba cannot run with Star Attention" in failed(
        "plan", "-m", bare_config, "--context", "4k"
    )


# ------------------------------------------------------------------ errors


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


def test_a_saved_context_is_no_text(texts: Path, tmp_path: Path) -> None:
    """Forbids the advice to convert it to UTF-8."""
    command = ["generate", *MODEL, "--query", "x"]
    says = "is a saved context, not a text; use `star-attention ask` to answer queries about it"
    assert f"book.star {says}" in failed(*command, texts / "book.star")
    assert f"stdin {says}" in failed(*command, "-", stdin=(texts / "book.star").read_bytes())
    (tmp_path / "of_ranks").mkdir()
    shutil.copy(texts / "book.star", tmp_path / "of_ranks" / "rank-0.safetensors")
    assert f"of_ranks {says}" in failed(*command, tmp_path / "of_ranks")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + NEEDLE.encode())
    options = ["generate", *MODEL, "--query", QUESTION, "--max-new-tokens", "1", "--json"]
    marked = json.loads(ok(*options, tmp_path / "marked.txt").out)
    assert (
        marked["context_tokens"]
        == json.loads(ok(*options, "-", stdin=NEEDLE).out)["context_tokens"]
    )


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
def test_values_that_cannot_work(texts: Path, options: list[str], message: str) -> None:
    assert message in failed("generate", *MODEL, texts / "book.txt", "--query", QUESTION, *options)


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
    """With remedies of the command line, not of Python."""
    for file in (BUNDLED / "config.json", *BUNDLED.glob("model*")):
        (tmp_path / file.name).symlink_to(file)
    bare = ["-m", tmp_path, "--dtype", "float32", "--query", QUESTION]
    says = f"the model at {tmp_path} has no tokenizer, which text input needs; copy its files"
    assert says in failed("generate", *bare, texts / "book.txt")
    assert says in failed("ask", *bare, texts / "book.star")
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


def test_saved_contexts_that_do_not_fit(texts: Path, tmp_path: Path) -> None:
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
        "its dtype is torch.float32, this model's is torch.bfloat16; load the model in float32 (dtype=, or --dtype)"
        in line
    )


def test_misuse_is_status_2(texts: Path) -> None:
    book, query = texts / "book.txt", ["--query", "x"]
    assert "Missing argument" in misused("generate", *MODEL, *query)
    assert "--model" in misused("generate", book, *query)
    assert "give a query" in misused("generate", *MODEL, book)
    assert "--temperatur" in misused("generate", *MODEL, book, *query, "--temperatur", "1")
    for option, value in (
        ("--top-p", "1.5"),
        ("--temperature", "-1"),
        ("--top-k", "x"),
        ("--stall-limit", "0.5"),
    ):
        said = misused("generate", *MODEL, book, *query, option, value)
        assert option in said
        assert re.search(f"[ ']{re.escape(value)}", said), (
            "the value, whatever the version of typer"
        )
    for option in ("--top-p", "--repetition-penalty"):
        assert f"'{option}': 0 is not above 0" in misused(
            "generate", *MODEL, book, *query, option, "0"
        )
    assert "stdin) can be read only once" in misused("generate", *MODEL, "-", "-", *query)
    assert "stdin already provides the text" in misused(
        "generate", *MODEL, "-", "--query-file", "-"
    )
    assert "--output" in misused("encode", *MODEL, book)
    assert "No such command" in misused("guess")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("generate", *MODEL, tmp_path / "none.txt", "--query", "x", "--debug")
    assert done.status == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: there is no text file")


# ------------------------------------------------------------------ demo


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself is tested in test_demo.py; it takes a minute."""
    calls = []

    def run_demo(settings: DemoSettings, out: str, *, progress: Any) -> str:
        calls.append((settings, out, progress))
        return "a table"

    for module, stand_in in (("run", {"run_demo": run_demo}), ("report", {"as_text": str})):
        name = f"star_attention.demo.{module}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**stand_in))
    assert (
        ok("demo", "-m", BUNDLED, "--out", tmp_path, "--tokens", "2k", "--seed", "3").out
        == "a table\n"
    )
    settings = DemoSettings(model=str(BUNDLED), tokens=2048, seed=3)
    assert calls == [(settings, str(tmp_path), say)]
    assert "tokens '2x' is not a number of tokens" in failed("demo", "--tokens", "2x")
    (tmp_path / "book.txt").write_text("a book")
    assert "book.txt is not a folder; give another one with --out" in failed(
        "demo", "-m", BUNDLED, "--out", tmp_path / "book.txt"
    )
    monkeypatch.chdir(tmp_path)
    assert "run this in a checkout of the repository" in failed("demo")


# ------------------------------------------------------------------ as it comes


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(60 * NOISE, encoding="utf-8")
    terminal, inside = pty.openpty()
    shown = b""
    try:
        options = [
            *CHAT,
            "--tokens-per-forward",
            "256",
            tmp_path / "long.txt",
            "-o",
            tmp_path / "long.star",
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "star_attention", "encode", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=inside,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        )
        os.close(inside)
        with contextlib.suppress(OSError):  # how a terminal ends whose other side is closed
            while part := os.read(terminal, 4096):
                shown += part
        assert process.wait(timeout=60) == 0
    finally:
        os.close(terminal)
    assert process.stdout is not None
    process.stdout.close()
    told = shown.decode()
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in told  # of the bar
    assert re.search(r"block \d+ of \d+, [\d,]+ of [\d,]+ tok", told)
    assert not re.search(r"^encoded [\d,]+ of", told, re.MULTILINE)  # the plain lines
    assert (tmp_path / "long.star").exists()


def test_an_answer_is_written_while_it_is_made(texts: Path) -> None:
    """Its first words are there long before its end."""
    process = start(
        "ask",
        *MODEL,
        texts / "book.star",
        "--query",
        QUESTION,
        "--max-new-tokens",
        "4k",
        "--ignore-eos",
    )
    assert process.stdout is not None
    try:
        assert os.read(process.stdout.fileno(), 4)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


# ------------------------------------------------------------------ interruptions


def test_ctrl_c_before_a_command_has_begun() -> None:
    """While its modules are imported, by the script that is installed."""
    code = """
import sys
from importlib.metadata import entry_points
class Interrupted:
    def find_spec(self, name, *_):
        if name == "star_attention.cli.generate":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
(script,) = entry_points(group="console_scripts", name="star-attention")
script.load()()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == ""


def test_ctrl_c_while_encoding_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(400 * NOISE, encoding="utf-8")
    options = [
        *CHAT,
        "--tokens-per-forward",
        "256",
        tmp_path / "long.txt",
        "-o",
        tmp_path / "long.star",
    ]
    process = start("encode", *options)
    assert process.stderr is not None
    told = []
    while not told or not told[-1].startswith("encoded "):
        told.append(process.stderr.readline())
        assert told[-1], told
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def test_ctrl_c_while_saving_keeps_the_file_of_before(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "book.star"
    shutil.copy(texts / "book.star", target)

    def interrupted(*arguments: Any, **more: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_file", interrupted)
    done = run("encode", *CHAT, texts / "book.txt", "-o", target)
    assert done.status == 130
    assert done.err.splitlines()[-1] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["book.star"]
    assert target.read_bytes() == (texts / "book.star").read_bytes()


def test_a_file_that_is_no_context_is_never_replaced(texts: Path, tmp_path: Path) -> None:
    """Forbids that a slip of the output's name costs the text itself."""
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


def test_a_reader_that_goes_away_is_no_error(texts: Path) -> None:
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
    done = subprocess.run(
        [
            "sh",
            "-c",
            f'exec "$@" {redirection}',
            "sh",
            sys.executable,
            "-m",
            "star_attention",
            *map(str, arguments),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_closed_streams(bare_config: Path, texts: Path, tmp_path: Path) -> None:
    """As cron and daemons leave them. Forbids an AttributeError of None."""
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full(bare_config: Path, unbuffered: str) -> None:
    """Forbids the system's bare error, and Python's complaint at exit."""
    says = "error: cannot write to standard output (No space left on device); free some space, or redirect it\n"
    for arguments in (["plan", "-m", bare_config, "--context", "8k"], ["--version"]):
        assert through_a_shell(">/dev/full", *arguments, PYTHONUNBUFFERED=unbuffered) == Done(
            1, "", says
        )


# ------------------------------------------------------------------ help and docs


def test_the_version() -> None:
    from star_attention import __version__

    assert ok("--version").out == f"star-attention {__version__}\n"


def test_without_a_command_it_shows_help() -> None:
    done = run()
    assert done.status == 2
    assert "generate" in done.out + done.err


def test_the_page_of_the_docs_is_fresh_and_does_not_depend_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert docs.main(["--check"]) == 0
    monkeypatch.setenv("COLUMNS", "31")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert docs.main(["--check"]) == 0
    for word in ("## star-attention ask", "`--top-k N`", "Default: 256.", "`tokens_per_s`"):
        assert word in docs.page()
    assert "Default: ." not in docs.page()
    monkeypatch.chdir(tmp_path)
    assert docs.main(["--check"]) == 1
    assert "docs/cli.md is stale; run: python -m star_attention.cli.docs" in capsys.readouterr().err
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    assert docs.main(["--bogus"]) == 2


@pytest.mark.parametrize(
    ("value", "text"), [(12.34, "12.3 s"), (0.4, "0.4 s"), (0.034, "0.03 s"), (1234.5, "1,234.5 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text
