"""`--system` and `--chat-template-kwargs` of the commands."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from tests.command_line import CHAT, MODEL, NEEDLE, NOISE, QUESTION, failed, ok
from tests.spelling import ids_of

ASK = ["--query", QUESTION, "--json", "--max-new-tokens", "1"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(NOISE + NEEDLE, encoding="utf-8")
    return path


def context_tokens(*arguments: str | Path) -> int:
    count: int = json.loads(ok(*arguments, *ASK).out)["context_tokens"]
    return count


def test_a_system_message_comes_before_the_text(book: Path) -> None:
    text = "Answer briefly.\n"
    plain = context_tokens("generate", *CHAT, book)
    assert context_tokens("generate", *CHAT, book, "--system", text) == plain + len(ids_of(text))


def test_template_arguments_reach_the_template(book: Path, tmp_path: Path) -> None:
    no_bos = ["--chat-template-kwargs", '{"bos_token": ""}']
    plain = context_tokens("generate", *CHAT, book)
    assert context_tokens("generate", *CHAT, book, *no_bos) == plain - 1
    saved = tmp_path / "book.star"
    ok("encode", *CHAT, book, *no_bos, "-o", saved)
    assert context_tokens("ask", *MODEL, saved, *no_bos) == plain - 1
    changed = failed("ask", *MODEL, saved, *ASK, "--chat-template-kwargs", '{"bos_token": "x"}')
    assert "chat_template_kwargs ['bos_token'] change the encoded part" in changed
    unread = failed("generate", *CHAT, book, *ASK, "--chat-template-kwargs", '{"thinking": 1}')
    assert "does not read 'thinking'" in unread


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--system", "Be brief."], "--system has no effect without --chat; add --chat"),
        (["--chat-template-kwargs", "{}"], "--chat-template-kwargs has no effect without --chat"),
        (["--chat", "--system", " "], "the system message is empty"),
        (["--chat", "--system", "\udcff"], "the system message '\\udcff' is not UTF-8"),
        (["--chat", "--chat-template-kwargs", "{a: 1}"], "'{a: 1}' is not JSON"),
        (["--chat", "--chat-template-kwargs", "[1]"], "expected a JSON object, got list"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(
    arguments: list[str], error: str, book: Path
) -> None:
    for command in (["generate", *MODEL, *ASK], ["encode", *MODEL, "-o", "never.star"]):
        line = failed(*command, book, *arguments)
        assert error in line


def test_a_rendered_query_is_a_warning(book: Path) -> None:
    """Forbids nested turns without a word, and one word said twice."""
    query = ["--query", f"<|q|>{QUESTION}<|a|>", "--max-new-tokens", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = ok("generate", *CHAT, book, *query)
    assert done.err.count("been through a template before") == 1
