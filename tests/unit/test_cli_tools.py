"""`--tools` of the commands: what the template gets, and the calls that are printed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.command_line import CHAT, MODEL, NOISE, failed, ok
from tests.conversations import TEMPLATES
from tests.engines import BUNDLED

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALL = (
    r"So.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    r"<parameter=n>\n2\n</parameter>\n</function>\n</tool_call>"
)
ASK = ["--query", "How is it?", "--answer-prefix", CALL, "--max-new-tokens", "1"]
MADE = {"name": "weather", "arguments": {"city": "Paris", "n": 2}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text, tools, and the bundled model with a chat template for tools."""
    (tmp_path / "book.txt").write_text(NOISE, encoding="utf-8")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = TEMPLATES["qwen3_coder"]
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_calls_are_printed(folder: Path) -> None:
    """On stderr beside the answer, with --json in it, and of a saved text as well."""
    book = [folder / "book.txt", "--chat", "--tools", folder / "tools.json"]
    model = ["-m", folder / "model", "--block-size", "256"]
    for more in ([], ["--no-stream"]):
        done = ok("generate", *model, *book, *ASK, *more)
        line = f"calls weather {json.dumps(MADE['arguments'])}"
        assert done.err.splitlines().count(line) == 1
    reply = json.loads(ok("generate", *model, *book, *ASK, "--json").out)
    plain = json.loads(ok("generate", *model, folder / "book.txt", "--chat", *ASK, "--json").out)
    assert (reply["tool_calls"], plain["tool_calls"]) == ([MADE], None)
    assert reply["context_tokens"] > plain["context_tokens"] + 50
    ok("encode", *model, *book, "-o", folder / "book.star")
    asked = ok("ask", "-m", folder / "model", folder / "book.star", *ASK, "--json")
    assert json.loads(asked.out)["tool_calls"] == [MADE]


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ("clock", "or one of the tools ['weather'], got 'clock'"),
        ("required", "tool_choice 'required' needs tools to choose from"),
    ],
)
def test_a_choice_that_no_answer_can_follow(folder: Path, choice: str, error: str) -> None:
    """Refused before anything is encoded, and before the first question of a chat."""
    tools = ["--tools", folder / "tools.json"] if choice == "clock" else []
    book, model = folder / "book.txt", ["-m", folder / "model", "--block-size", "256"]
    chosen = ["--tool-choice", choice]
    assert error in failed("generate", *model, book, "--chat", *tools, *ASK, *chosen)
    assert error in failed("chat", *model, book, *tools, *chosen, stdin="Hi\n")
    ok("encode", *model, book, "--chat", *tools, "-o", folder / "book.star")
    for command in ("ask", "chat"):
        query = ["--query-file", "-"] if command == "ask" else []
        saved = [command, "-m", folder / "model", folder / "book.star", *query, *chosen]
        assert error in failed(*saved, stdin="Hi\n")


def test_a_choice_that_forces_nothing(folder: Path) -> None:
    """It goes with a template of an unknown form of calls, of which no call can be forced."""
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    writes = (
        "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    config["chat_template"] = writes
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = ["-m", folder / "model", "--block-size", "256"]
    text = [folder / "book.txt", "--chat-template-kwargs", json.dumps({"tools": TOOLS})]
    ok("encode", *model, *text, "--chat", "-o", folder / "book.star")
    saved = ["-m", folder / "model", folder / "book.star", "--max-new-tokens", "1"]
    ask = ["--query", "Hi", "--json"]
    for choice in ("auto", "none"):
        chosen = ["--tool-choice", choice]
        asked = ok("ask", *saved, *ask, *chosen)
        made = ok("generate", *model, *text, "--chat", *ask, "--max-new-tokens", "1", *chosen)
        for done in (asked, made):
            assert json.loads(done.out)["tool_calls"] is None
        ok("chat", *saved, *chosen, stdin="Hi\n")
        ok("chat", *model, *text, "--max-new-tokens", "1", *chosen, stdin="Hi\n")
    for command in (["ask", *saved, "--query", "Hi"], ["chat", *saved], ["chat", *model, *text]):
        assert "unknown form" in failed(*command, "--tool-choice", "required", stdin="Hi\n")


def test_a_call_that_has_to_be_made(folder: Path) -> None:
    pytest.importorskip("xgrammar")
    mode = {"type": "string", "enum": ["a"]}
    parameters = {"type": "object", "properties": {"mode": mode}, "required": ["mode"]}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("weather", "clock")
    ]
    (folder / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    book = [folder / "book.txt", "--chat", "--tools", folder / "tools.json", "--save"]
    model = ["-m", folder / "model", "--block-size", "256"]
    ask = ["--query", "How is it?", "--max-new-tokens", "200", "--tool-choice", "clock", "--json"]
    made = [{"name": "clock", "arguments": {"mode": "a"}}]
    done = ok("generate", *model, *book, folder / "book.star", *ask)
    assert json.loads(done.out)["tool_calls"] == made
    asked = ok("ask", "-m", folder / "model", folder / "book.star", *ask)
    assert json.loads(asked.out)["tool_calls"] == made
    none = [*ask[:-2], "none", "--json", "--max-new-tokens", "4"]
    quiet = ok("ask", "-m", folder / "model", folder / "book.star", *none)
    assert json.loads(quiet.out)["tool_calls"] is None


def test_tools_may_come_by_a_pipe(folder: Path) -> None:
    """As with `--tools <(command)` in a shell: what is read once is gone."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    text = (folder / "tools.json").read_text(encoding="utf-8")
    writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
    writer.start()
    book = [folder / "book.txt", "--chat", "--tools", pipe]
    done = ok("generate", "-m", folder / "model", "--block-size", "256", *book, *ASK, "--json")
    assert json.loads(done.out)["tool_calls"] == [MADE]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--tools", "tools.json"], "--tools has no effect without --chat; add --chat"),
        (["--chat", "--tools", "none.json"], "none.json"),
        (["--chat", "--tools", "book.txt"], "book.txt is not JSON"),
        (["--chat", "--tools", "object.json"], "expected a list of tools"),
        (["--chat", "--tools", "-"], "give a file"),
        (
            ["--chat", "--tools", "tools.json", "--chat-template-kwargs", '{"tools": []}'],
            "tools are given twice",
        ),
    ],
)
def test_tools_that_cannot_work_are_refused(
    arguments: list[str], error: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("object.json").write_text("{}", encoding="utf-8")
    for command in (["generate", *MODEL, *ASK], ["encode", *MODEL, "-o", "never.star"]):
        assert error in failed(*command, folder / "book.txt", *arguments)


def test_a_model_without_tools_says_so(folder: Path) -> None:
    tools = ["--tools", folder / "tools.json"]
    error = failed("generate", *CHAT, folder / "book.txt", *ASK, *tools)
    assert "the model's chat template takes no tools" in error
    ok("encode", *CHAT, folder / "book.txt", "-o", folder / "book.star")
    assert "--tools has no effect on" in failed("chat", folder / "book.star", *tools)
