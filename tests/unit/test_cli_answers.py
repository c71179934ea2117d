"""`generate`, `encode` and `ask`, run with the bundled model on a text of a few hundred tokens."""

from __future__ import annotations

import json
import os
import pty
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention.cli import output
from star_attention.cli.escapes import unescape
from star_attention.cli.formatting import answer_summary
from star_attention.generation.result import Generation, Timings
from tests.command_line import (
    CHAT,
    MODEL,
    OTHER,
    OTHER_QUESTION,
    QUESTION,
    failed,
    ok,
    start,
    usage_error,
)
from tests.engines import BUNDLED
from tests.spelling import ids_of


def test_generate_prints_the_answer_on_stdout_and_the_rest_on_stderr(texts: Path) -> None:
    done = ok("generate", *CHAT, texts / "book.txt", "--query", QUESTION)
    assert done.out == "The secret number for torpidity-kill is 4910508\n"
    loading, *_, progress, summary = done.err.splitlines()
    assert loading == f"loading {BUNDLED}"
    assert progress == "encoded 567 of 567 tok, block 3 of 3"
    times = r"encode [\d.]+ s, first token [\d.]+ s, \d+ tok/s"
    assert re.fullmatch(f"context 567 tok, 3 blocks x 256, anchor 256, {times}", summary)


def test_quiet_prints_nothing_on_stderr(texts: Path) -> None:
    assert ok("generate", *CHAT, texts / "book.txt", "--query", QUESTION, "-q").err == ""


def test_json_has_exactly_the_documented_fields(texts: Path) -> None:
    done = ok(
        "generate", *CHAT, texts / "book.txt", "--query", QUESTION, "--anchor-size", "128", "--json"
    )
    (line,) = done.out.splitlines()
    reply = json.loads(line)
    assert list(reply) == [
        "query",
        "text",
        "reasoning",
        "reasoning_tokens",
        "token_ids",
        "finish_reason",
        "stop_string",
        "logprobs",
        "tool_calls",
        "sources",
        "method",
        "context_tokens",
        "query_tokens",
        "kept_tokens",
        "block_size",
        "anchor_size",
        "lookback",
        "lookback_layers",
        "blocks",
        "ranks",
        "tensor_parallel",
        "reused_tokens",
        "encode_s",
        "ttft_s",
        "second_look_s",
        "sources_s",
        "tokens_per_s",
        "peak_bytes",
        "wire_bytes_phase1",
        "wire_bytes_phase2",
        "wire_calls_phase1",
        "wire_calls_phase2",
        "wire_within_bytes_phase1",
        "wire_within_bytes_phase2",
        "per_rank",
    ]
    assert list(reply) == list(output.FIELDS)
    assert reply["query"] == QUESTION
    assert reply["text"].endswith("4910508")
    assert reply["token_ids"][-1] == 2
    assert reply["finish_reason"] == "stop"
    assert (reply["method"], reply["context_tokens"], reply["query_tokens"]) == ("star", 567, 16)
    assert (reply["block_size"], reply["anchor_size"]) == (256, 128)
    assert (reply["blocks"], reply["ranks"]) == (3, 1)
    assert min(reply["encode_s"], reply["ttft_s"], reply["tokens_per_s"]) > 0
    assert reply["peak_bytes"] is None
    for name in ("wire_bytes_phase1", "wire_bytes_phase2", "wire_within_bytes_phase1"):
        assert reply[name] == 0
    (rank,) = reply["per_rank"]
    assert rank == {"tokens": 567, "encode_s": reply["encode_s"], "peak_bytes": None}


def test_raw_text_is_not_a_chat(texts: Path) -> None:
    """Without --chat the query follows the text as it is."""
    prefix = "<|q|>" + QUESTION + "<|a|>The secret number for torpidity-kill is "
    options = ["--query", prefix, "--method", "dense", "--no-stream"]
    done = ok("generate", *MODEL, texts / "book.txt", *options)
    assert done.out.strip() == "4910508"
    assert "context 567 tok, dense, encode " in done.err


def test_several_files_and_stdin_are_joined_in_order(texts: Path) -> None:
    """Parts joined with a line break give the same tokens as one file with that text."""
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
    first = "The secret number for torpidity-kill is 4910508"
    second = "The secret number for lyric-known is 8081780"
    in_order = ok("generate", *options)
    assert in_order.out == f"> {QUESTION}\n{first}\n\n> {OTHER_QUESTION}\n{second}\n"
    describes_context = [line.startswith("context 8") for line in in_order.err.splitlines()[-2:]]
    assert describes_context == [True, False]
    batch = ok("generate", *options, "--batch", "--json")
    assert [json.loads(line)["text"] for line in batch.out.splitlines()] == [first, second]
    assert "batch of 2, first token" in batch.err


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
    command = ["ask", *MODEL, texts / "book.star", "--query", QUESTION, "--query", QUESTION]
    first, second = map(json.loads, ok(*command, "--json", *options).out.splitlines())
    if options[0] == "--temperature":
        first, second = (
            {k: v for k, v in reply.items() if k not in times} for reply in (first, second)
        )
        assert (
            first["text"] != "The secret number for torpidity-kill is 4910508"[: len(first["text"])]
        )
    assert check(first, second)


def test_escapes_on_the_command_line_are_read(texts: Path) -> None:
    """Forbids a stop string of backslash and n, which never occurs."""
    command = ["ask", *MODEL, texts / "book.star", "--query", QUESTION, "--max-new-tokens", "6"]
    prefixed = [*command, "--answer-prefix", r"\tThe\n", "--json"]
    assert json.loads(ok(*prefixed).out)["query_tokens"] == 16 + len(ids_of("\tThe\n"))
    stopped = [*command, "--ignore-eos", "--stop", r"\n", "--stop", " number"]
    assert ok(*stopped).out == "The secret\n"


def test_only_escapes_are_read() -> None:
    for text in ("a\nb", r"\d \\", "\\", r"C:\dir"):
        assert unescape(text, "--stop") == text
    assert unescape(r"\n\nUser:\t\r", "--stop") == "\n\nUser:\t\r"
    assert unescape(r"\\n\\nabla", "--stop") == r"\n\nabla"
    with pytest.warns(UserWarning, match=r"--stop .*: \\n is read as .*; write \\\\nabla"):
        assert unescape(r"x\nabla", "--stop") == "x\nabla"


def test_an_answer_may_keep_its_special_tokens(texts: Path) -> None:
    done = ok(
        "ask", *MODEL, texts / "book.star", "--query", QUESTION, "--show-special-tokens", "-q"
    )
    assert done.out == "The secret number for torpidity-kill is 4910508<eos>\n"


def test_log_probabilities_come_with_json(texts: Path) -> None:
    command = ["ask", *MODEL, texts / "book.star", "--query", QUESTION, "--logprobs", "2"]
    reply = json.loads(ok(*command, "--json").out)
    assert [token["id"] for token in reply["logprobs"]] == reply["token_ids"]
    assert "".join(token["token"] for token in reply["logprobs"]) == reply["text"] + "<eos>"
    for token in reply["logprobs"]:
        first, second = token["top"]
        # The answer is greedy.
        assert {name: token[name] for name in ("token", "id", "logprob")} == first
        assert second["logprob"] <= first["logprob"] <= 0
    assert "--logprobs: it needs --json" in usage_error(*command)


def test_the_summary_says_what_ended_or_is_missing(texts: Path) -> None:
    command = ["ask", *MODEL, texts / "book.star", "--query", QUESTION, "--max-new-tokens", "3"]
    assert ok(*command).err.endswith(", ended by --max-new-tokens after 3 tokens\n")
    timings = Timings(encode_s=1.0, ttft_s=0.5, tokens_per_s=None)
    reply = Generation(
        text="",
        token_ids=[3],
        finish_reason="stop",
        query_tokens=1,
        timings=timings,
        reasoning="why",
        reasoning_tokens=3,
    )
    expected = "first token 0.5 s, 3 tokens of reasoning not shown (see --show-reasoning)"
    assert answer_summary(reply) == expected
    # A batch counts the tokens of all.
    fast = replace(reply, timings=replace(timings, tokens_per_s=7.0), finish_reason="length")
    expected = "first token 0.5 s, 14 tok/s, 2 ended by --max-new-tokens after 1 tokens"
    assert answer_summary(fast, fast, reply).startswith(expected)


@pytest.mark.filterwarnings("default")
def test_greedy_overrides_sampling_options_with_a_warning(texts: Path) -> None:
    sampling = ["--top-p", "0.5", "--top-k", "3"]
    done = ok("ask", *MODEL, texts / "book.star", "--query", QUESTION, "--greedy", *sampling)
    assert done.out.endswith("4910508\n")
    assert done.err.count("warning: --top-p, --top-k ignored: --greedy was given\n") == 1
    done = ok(
        "generate", *CHAT, texts / "book.txt", "--query", QUESTION, "--greedy", "--top-k", "3"
    )
    assert done.err.count("--greedy was given") == 1


def test_encode_and_ask(texts: Path, tmp_path: Path) -> None:
    done = ok("encode", *CHAT, texts / "book.txt", "-o", tmp_path / "book.star")
    assert done.out == ""
    *_, summary, saved = done.err.splitlines()
    assert summary.startswith("context 567 tok, 3 blocks x 256, anchor 256, encode ")
    assert summary.endswith(" s, 5.5 MiB of keys and values")
    assert saved.startswith(f"saved to {tmp_path / 'book.star'} (5.6 MiB)")
    # Precision, method, sizes and the chat come from the file.
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
    # Leaves room for a question of 20 tokens.
    room = 65536 - 567 - 20
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
    # Stdout is not a terminal here, so it does not contain the prompts.
    first, second = out.splitlines()
    assert first == "The secret number for torpidity-kill is 4910508"
    assert second.startswith("The secret number for lyric-known is ")
    assert "an empty line or Ctrl-D ends\n? context 567 tok" in err
    assert f"error: context (567), query and answer ({room:,}) need 65,5" in err


def test_ask_without_a_terminal_needs_a_query(texts: Path) -> None:
    assert "--query or --query-file: give a query" in usage_error(
        "ask", *MODEL, texts / "book.star"
    )


def test_a_second_look_shows_in_the_summary_and_in_json(texts: Path) -> None:
    look = ["--second-look", "0.2", "--query", QUESTION]
    done = ok("generate", *CHAT, texts / "book.txt", *look)
    assert done.out == "The secret number for torpidity-kill is 4910508\n"
    assert re.search(r"first token [\d.]+ s \(second look [\d.]+ s\)", done.err)
    asked = json.loads(ok("ask", texts / "book.star", *MODEL, *look, "--json").out)
    assert 0 < asked["second_look_s"] < asked["ttft_s"]
    for share in ("1.1", "-0.1", "nan"):
        message = failed("ask", texts / "book.star", "--second-look", share, "--query", QUESTION)
        assert message.startswith(f"error: second_look {share} is not a share from 0 to 1; give")


def test_sources_are_printed_on_stderr_and_in_json(texts: Path) -> None:
    options = ["--sources", "2", "--query", QUESTION]
    done = ok("generate", *CHAT, texts / "book.txt", *options)
    assert done.out == "The secret number for torpidity-kill is 4910508\n"
    lines = [line for line in done.err.splitlines() if line.startswith("source, weight 0.")]
    assert len(lines) == 2
    assert lines[0].endswith("The secret number for torpidity-kill is 4910508.")
    asked = json.loads(ok("ask", texts / "book.star", *MODEL, *options, "--json").out)
    best = asked["sources"][0]
    assert list(best) == [
        "start",
        "stop",
        "start_char",
        "stop_char",
        "message",
        "text",
        "weight",
    ]
    assert best["text"] == "The secret number for torpidity-kill is 4910508."
    assert asked["sources_s"] > 0
