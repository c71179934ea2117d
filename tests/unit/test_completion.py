"""Shell completion: what `--install-completion` writes completes commands, options and files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BASH = shutil.which("bash")
COMPLETE = """
source ~/.bashrc
COMP_WORDS=({words}); COMP_CWORD={last}
_star_attention_completion star-attention
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which completion for bash was installed, and the command beside it."""
    home = tmp_path_factory.mktemp("home")
    script = home / "star-attention"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m star_attention "$@"\n')
    script.chmod(0o755)
    done = bash(home, "star-attention --install-completion bash")
    assert "bash completion installed" in done
    return home


def bash(home: Path, script: str) -> str:
    environment = os.environ | {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(home), os.environ["PATH"]]),
        # typer would look for the shell that started the tests.
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(
        [str(BASH), "--norc", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("star-attention gen", ["generate"]),
        ("star-attention eval per", ["perplexity"]),
        ("star-attention encode --block", ["--block-size"]),
        # Nothing of ours: bash goes on to file names.
        ("star-attention encode book", [""]),
    ],
)
def test_bash_completes(home: Path, words: str, completed: list[str]) -> None:
    script = COMPLETE.format(words=words, last=len(words.split()) - 1)
    assert bash(home, script).split("\n")[:-1] == completed


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_falls_back_to_file_names(home: Path) -> None:
    registered = bash(home, "source ~/.bashrc; complete -p star-attention")
    assert registered == "complete -o default -F _star_attention_completion star-attention\n"
