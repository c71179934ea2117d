"""`star-attention chat`: questions and commands, from pipes and on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from tests.command_line import (
    MODEL,
    NEEDLE,
    NOISE,
    OTHER,
    OTHER_QUESTION,
    QUESTION,
    failed,
    ok,
    run,
    usage_error,
)
from tests.engines import BUNDLED
from tests.warm import python

FIRST = "The secret number for torpidity-kill is 4910508"
SECOND = "The secret number for lyric-known is 8081780"
BOOK = [*MODEL, "--block-size", "256"]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(8 * NOISE + NEEDLE + 4 * NOISE + OTHER + 4 * NOISE, encoding="utf-8")
    return path


def lines(*given: str) -> str:
    return "".join(f"{line}\n" for line in given)


def test_a_pipe_gets_answers_alone(book: Path) -> None:
    """In a process of its own: no prompt on stdout, and every answer on a line."""
    done = subprocess.run(
        python("-m", "star_attention", "chat", *BOOK, book),
        input=lines(QUESTION, "", OTHER_QUESTION, "/undo", OTHER_QUESTION),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == lines(FIRST, SECOND, SECOND)
    assert "? " not in done.stderr.replace(QUESTION, "")
    assert "1 turn left" in done.stderr


@pytest.mark.slow
def test_every_question_follows_the_answers_before(book: Path) -> None:
    """The same answers, tokens and counts as of the library."""
    done = ok("chat", *BOOK, book, "--json", stdin=lines(QUESTION, OTHER_QUESTION, QUESTION))
    star = StarLLM.from_pretrained(BUNDLED, block_size=256, dtype="float32")
    content = [{"role": "user", "content": book.read_text(encoding="utf-8")}]
    reply: Any = star.encode(content)
    for line, query in zip(
        done.out.splitlines(), (QUESTION, OTHER_QUESTION, QUESTION), strict=True
    ):
        printed = json.loads(line)
        reply = star.generate(reply, query, keep=True)
        assert printed["query"] == query
        for field in ("text", "token_ids", "query_tokens", "kept_tokens"):
            assert printed[field] == reply.as_dict()[field]
    assert reply.kept_tokens > 0


def test_save_and_go_on(book: Path, tmp_path: Path) -> None:
    """A conversation that was interrupted answers as one that was not."""
    talk = tmp_path / "talk one.star"
    whole = ok("chat", *BOOK, book, "--json", stdin=lines(QUESTION, OTHER_QUESTION, QUESTION))
    first = ok("chat", *BOOK, book, stdin=lines(QUESTION, f"/save {talk}", "/quit", "unread"))
    assert first.out == lines(FIRST)
    assert f"saved to {talk} (" in first.err
    assert "protect it like the text" in first.err
    done = ok("chat", talk, "--json", stdin=lines(OTHER_QUESTION, QUESTION, "/save"))
    assert f"continuing after 1 turn; the last answer: {FIRST}" in done.err
    fields = "text", "token_ids", "query_tokens", "kept_tokens"
    for actual, expected in zip(done.out.splitlines(), whole.out.splitlines()[1:], strict=True):
        answer, right = json.loads(actual), json.loads(expected)
        assert [answer[name] for name in fields] == [right[name] for name in fields]
    again = ok("chat", talk, stdin=lines("/undo 2", OTHER_QUESTION))
    assert again.out == lines(SECOND)
    facts = json.loads(ok("info", talk, "--json").out)
    assert (facts["kind"], facts["turns"]) == ("saved conversation", 3)
    assert ok("ask", talk, "--query", QUESTION).out == lines(FIRST)


def test_a_saved_text_is_not_copied(book: Path, tmp_path: Path) -> None:
    saved, talk = tmp_path / "book.star", tmp_path / "talk.star"
    ok("encode", *BOOK, "--chat", book, "-o", saved, "-q")
    done = ok("chat", saved, stdin=lines(QUESTION, f"/save {talk}"))
    assert done.out == lines(FIRST)
    assert talk.stat().st_size < saved.stat().st_size / 2
    assert ok("chat", talk, stdin=lines(OTHER_QUESTION)).out == lines(SECOND)
    facts = json.loads(ok("info", talk, "--json").out)
    assert (facts["turns"], facts["chat"], facts["blocks"]) == (1, True, 3)
    assert "is a conversation, and the context" in failed("ask", talk, "--query", QUESTION)
    refused = failed("encode", *MODEL, book, "--chat", "--reuse", talk, "-o", tmp_path / "b.star")
    assert "is a conversation, and the context" in refused
    kept = run("chat", saved, stdin=lines(QUESTION, f"/save {saved}"))
    assert (kept.status, kept.out) == (1, lines(FIRST))
    assert "error: cannot save the conversation" in kept.err


def test_commands_that_cannot_work(book: Path, tmp_path: Path) -> None:
    """Each is an error of its own, and the conversation goes on; the status tells a script."""
    given = ["/undo", "/save x", "/nope", QUESTION, "/undo two", "/undo 3", "/save", "/reset"]
    given += ["/save x", "/help", "  /save is a command, what is the tea?"]
    done = run("chat", *BOOK, book, "--max-new-tokens", "24", stdin=lines(*given))
    assert done.status == 1
    assert done.out.splitlines()[0] == FIRST
    assert len(done.out.splitlines()) == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    for error, fragment in zip(
        errors,
        [
            "no turn can be undone, because there is none; ask first",
            "no turn can be saved, because there is none; ask first",
            "there is no command '/nope'; /help lists them",
            "/undo takes a number of turns, got 'two'; give 1",
            "turns 3 cannot be undone: the conversation has 1; give 0..1",
            "/save has no name yet; give one: /save FILE",
            "no turn can be saved, because there is none; ask first",
        ],
        strict=True,
    ):
        assert fragment in error
    assert "all turns are forgotten" in done.err
    assert "/undo [N]     forget the last turn" in done.err


@pytest.mark.slow
def test_a_question_without_room_is_refused_and_forgotten(book: Path) -> None:
    context = json.loads(ok("chat", *BOOK, book, "--json", stdin=lines(QUESTION)).out)
    room = 65536 - context["context_tokens"] - context["query_tokens"] - 5
    options = ["--max-new-tokens", str(room)]
    done = run("chat", *BOOK, book, *options, stdin=lines(QUESTION, OTHER_QUESTION, "/reset"))
    assert (done.status, done.out) == (1, lines(FIRST))
    assert "with 1 turn before it: lower max_new_tokens, or undo turns" in done.err


def test_options_that_do_not_fit(book: Path, tmp_path: Path) -> None:
    saved = tmp_path / "book.star"
    ok("encode", *BOOK, "--chat", book, "-o", saved, "-q")
    for option in (["--block-size", "64"], ["--no-chat"], ["--system", "Be kind."]):
        message = failed("chat", saved, *option)
        assert message.startswith(f"error: {option[0]} has no effect on {saved}, which is encoded")
    assert "--model: give a model" in usage_error("chat", book)
    assert "stdin brings the questions" in usage_error("chat", *MODEL, "-")
    assert "there is no text file" in failed("chat", *MODEL, tmp_path / "none.txt")
    assert "seed" in failed("chat", saved, "--seed", str(2**70))


@pytest.mark.slow
def test_without_a_chat_template_the_text_goes_on(book: Path) -> None:
    options = [*BOOK, book, "--no-chat", "--max-new-tokens", "4", "--ignore-eos", "--json"]
    done = ok("chat", *options, stdin=lines("The hill", "A cold"))
    first, second = map(json.loads, done.out.splitlines())
    star = StarLLM.from_pretrained(BUNDLED, block_size=256, dtype="float32")
    context = star.encode(book.read_text(encoding="utf-8"))
    said = f"The hill{first['text']}\nA cold"
    whole = star.generate(context, said, max_new_tokens=4, ignore_eos=True)
    assert second["token_ids"] == whole.token_ids


# -------------------------------------------------------------------------------------- terminal


class Terminal:
    """A terminal with the command in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self.number, keys.encode())

    def wait_for(self, text: str, *, again: str = "") -> None:
        """Read until a text has come, and drop all up to it; type keys again until it comes."""
        end = time.monotonic() + 120.0
        typed = time.monotonic()
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen!r}"
            if again and time.monotonic() > typed + 5.0:
                self.type(again)
                typed = time.monotonic()
            if select.select([self.number], [], [], 1.0)[0]:
                try:
                    self.seen += os.read(self.number, 4096).decode(errors="replace")
                except OSError:
                    # The command has ended.
                    assert text in self.seen, self.seen
        self.seen = self.seen.partition(text)[2]


def _take_terminal() -> None:
    """Let a new process have its terminal, and Ctrl-C, which one in the background ignores."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def terminal(*arguments: str | Path) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    """Run the command in a terminal of its own, whose Ctrl-C reaches it."""
    number, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "star_attention", "chat", *map(str, arguments)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=os.environ | {"TERM": "dumb"},
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(inside)
    try:
        yield Terminal(number), process
    finally:
        process.kill()
        process.wait()
        os.close(number)


def test_a_terminal(book: Path) -> None:
    """Prompts, editing, history, Ctrl-C in an answer and at the prompt, Ctrl-D."""
    pytest.importorskip("readline")
    options = ["--max-new-tokens", "20000", "--ignore-eos"]
    with terminal(*BOOK, book, *options) as (screen, process):
        screen.wait_for("/help lists commands, Ctrl-D ends")
        screen.wait_for("? ")
        screen.type(f"{QUESTION}\n")
        screen.wait_for("4910508")
        screen.type("\x03")
        screen.wait_for("stopped: the answer is remembered as far as it came")
        screen.wait_for("? ")
        screen.type("\x03")
        # Python may have printed the prompt, but not be waiting yet: it sees the signal with the
        # next key then.
        screen.wait_for("Ctrl-D or /quit leaves", again="\x03")
        screen.wait_for("? ")
        # Key up brings the question back, and what is typed follows it.
        screen.type("\x1b[A")
        screen.wait_for(QUESTION)
        screen.type("\n")
        screen.wait_for("The secret")
        screen.type("\x03")
        screen.wait_for("stopped")
        screen.wait_for("? ")
        screen.type("/undo\n")
        screen.wait_for("1 turn left")
        screen.wait_for("? ")
        screen.type("\x04")
        assert process.wait(60) == 0
