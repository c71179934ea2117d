"""Every shell and Python block of the README and of docs/ runs as printed.

A document's blocks run in order, in a folder of their own with the checkout's `models`, `examples`
(of a shorter book) and `scripts` in it, and its Python blocks share their names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from star_attention.cli import app
from tests.command_line import Done, run
from tests.desks import lay_out
from tests.printed_blocks import DOCUMENTS, ROOT, Block, blocks

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]

NOT_RUN = {
    "git clone": "installs into a checkout, as CI does",
    "torchrun --nproc-per-node": "several ranks; tests/dist runs the same programs",
    "tensor_parallel=2": "two ranks",
    "#SBATCH": "a Slurm cluster",
    "-m MODEL": "a model of the reader's",
    "curl -LO": "network",
    "pip download": "network",
    "[lm-eval]": "a package of 600 MB",
    "--shapes llama-3.1-8b": "a large model, on a GPU",
    "bench plot prefill.json": "the report of the benchmark before it",
    "scripts/results.py": "a GPU",
    'Report.read("results")': "a run of the commands above it",
    ".gguf": "a GGUF file of the reader's",
    "my-adapter": "an adapter of the reader's",
    "star-attention serve": "a server, which runs until it is ended",
    "127.0.0.1:8000": "that server",
    "client.responses": "that server",
    "Qwen3-8B": "a model that calls tools",
    "llm -m kept": "that server",
    "printf": "a shell's pipe; tests of `chat` have one",
}
"""Blocks that do not run here, by words in them, with what they need."""

SLOW = (
    "star-attention eval",
    "star-attention bench",
    "star-attention demo",
    "star-attention calibrate",
)
"""Commands that take from ten seconds to minutes; `make test-slow` runs them."""


def reason(block: Block) -> str | None:
    """Return why a block does not run here."""
    return next((why for words, why in NOT_RUN.items() if words in block.text), None)


def is_slow(block: Block) -> bool:
    return block.language == "shell" and any(words in block.text for words in SLOW)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader's: the checkout's texts and models, and nothing else."""
    monkeypatch.chdir(lay_out(tmp_path))
    return tmp_path


def run_command(words: list[str]) -> Done:
    """Run a command of a block: our own in this process, any other in one of its own."""
    if words[0] == "star-attention":
        return run(*words[1:])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, env=os.environ | {"PATH": path}
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_block(block: Block, names: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)
        return
    for words in block.commands:
        done = run_command(words)
        assert done.status == 0, (words, done.err)
        assert "warning: " not in done.err, (words, done.err)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run_as_printed(
    document: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    for block in blocks(document):
        if reason(block) is None and not is_slow(block):
            run_block(block, names)
    if document.name == "README.md":
        answer = "The secret number for petal-kiss is 4910508"
        # Of generate, stream, and two rows of a batch.
        assert capsys.readouterr().out.count(answer) == 4


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in BLOCKS if is_slow(block)], ids=str)
def test_slow_blocks_run_as_printed(block: Block, folder: Path) -> None:
    if reason(block) is not None:
        pytest.skip(f"needs {reason(block)}")
    run_block(block, {})


def star_attention_commands() -> list[tuple[str, list[str]]]:
    """The arguments of every command of ours that is printed, with what torchrun starts."""
    found = []
    for block in BLOCKS:
        for words in block.commands if block.language == "shell" else []:
            if words[0] == "star-attention":
                found.append((f"{block} {words[1]}", words[1:]))
            elif "star_attention" in words:
                arguments = words[words.index("star_attention") + 1 :]
                found.append((f"{block} {arguments[0]}", arguments))
    return found


@pytest.mark.parametrize(
    "arguments", [pytest.param(words, id=name) for name, words in star_attention_commands()]
)
def test_printed_commands_take_the_printed_options(arguments: list[str]) -> None:
    """Also those that do not run here. Forbids an option that was renamed."""
    command, words = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("star-attention", words)


def test_the_exceptions_are_needed() -> None:
    text = "\n".join(block.text for block in BLOCKS)
    assert [words for words in (*NOT_RUN, *SLOW) if words not in text] == []
    assert len(BLOCKS) > 40
    assert sum(reason(block) is None for block in BLOCKS) > 20


def test_a_block_that_fails_is_seen(folder: Path) -> None:
    with pytest.raises(NameError):
        run_block(Block("x.md", 1, "python", "print(undefined)"), {})
    with pytest.raises(AssertionError):
        run_block(Block("x.md", 1, "shell", "star-attention plan -m nowhere --context 8k"), {})
