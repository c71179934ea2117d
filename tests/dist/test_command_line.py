"""The command under torchrun: one rank speaks for all, and misuse reads as on one process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.evals.runs.predictions import read_predictions
from star_attention.evals.runs.run_folder import read_run
from tests.engines import BUNDLED
from tests.warm import python

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(
    *arguments: str | Path, stdin: str | None = None, fresh: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command on two ranks, whose processes are fresh or have imported torch."""
    command = ["-m", "star_attention", *arguments]
    if not fresh:
        command = ["--no-python", *python(*command)]
    return subprocess.run(
        python(*TORCHRUN, *command),
        input=stdin,
        env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1") | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def book(tmp_path: Path) -> Path:
    text = tmp_path / "book.txt"
    text.write_text("The tea is hot and the cup is blue.\n" * 60)
    return text


def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    saved = tmp_path / "book.star"
    options = ["--chat", "--method", "ring", "--block-size", "64"]
    run = torchrun("encode", "-m", BUNDLED, *options, book(tmp_path), "-o", saved, fresh=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stderr.splitlines()
    assert sum("have no effect on ring attention" in line for line in lines) == 1
    progress = [line for line in lines if line.startswith("encoded: ")]
    assert progress[-1] == "encoded: all 2 ranks are done"
    assert any(
        line.startswith("context ") and "tok, 2 ranks, ring, encode " in line for line in lines
    )
    solo_run = subprocess.run(
        python("-m", "star_attention", "encode", "-m", BUNDLED, book(tmp_path), "-o", saved),
        env=os.environ | dict(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert solo_run.returncode == 1
    assert "a folder that several ranks saved, and one process saves a file" in solo_run.stderr
    assert "loading" not in solo_run.stderr, "before any work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "x", "--block-size", "4x"], "block_size '4x' is not a number"),
        (["--qury", "x"], "No such option: --qury"),
        pytest.param(
            [],
            "Invalid value for --query or --query-file: give a query",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_misuse_is_reported_once_and_without_a_traceback(
    tmp_path: Path, options: list[str], message: str
) -> None:
    """A late reporting rank reports too: the launcher would end it with the first that ends."""
    text = book(tmp_path)
    late = "import os, time\ntime.sleep(1.5 * (os.environ.get('LOCAL_RANK') == '0'))\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    run = torchrun("generate", "-m", BUNDLED, text, *options, PYTHONPATH=path)
    assert run.returncode != 0
    stderr = " ".join(run.stderr.replace("│", " ").split())
    assert stderr.count(message) == 1, run.stderr[-3000:]
    # torchrun's own report has a traceback.
    own_stderr = run.stderr.partition("torch/distributed/elastic")[0]
    assert "star_attention/cli" not in run.stderr, own_stderr


@pytest.mark.slow
def test_evaluations_on_several_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    options = [
        "--dtype",
        "float32",
        "--task",
        "niah_single_1,vt",
        "--length",
        "768",
        "--samples",
        "2",
    ]
    options += ["--max-new-tokens", "6", "--variants", "star:/4,ring", "--device", "cpu"]
    arguments = ["eval", "ruler", "-m", str(BUNDLED), *options, "--out"]
    run = torchrun(*arguments, tmp_path / "two")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("report.html") == 1
    assert sum("8 of 8 answers" in line for line in run.stderr.splitlines()) == 1
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "one")]).exit_code == 0
    on_two_ranks, on_one_rank = (
        [(line.key, line.prediction) for line in read_predictions(tmp_path / name)]
        for name in ("two", "one")
    )
    assert on_two_ranks == on_one_rank
    assert read_run(tmp_path / "two")["sessions"][0]["ranks"] == 2


@pytest.mark.slow
def test_ranks_talk_as_one(tmp_path: Path) -> None:
    """Rank 0 reads the lines; all ranks keep, undo and save what was said."""
    talk = tmp_path / "talk"
    options = ["--block-size", "64", "--max-new-tokens", "8"]
    lines = f"What is hot?\nWhat is blue?\n/undo\n/save {talk}\nWhat is blue?\n"
    run = torchrun("chat", "-m", BUNDLED, *options, book(tmp_path), stdin=lines)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second, again = run.stdout.splitlines()
    assert second == again
    assert run.stderr.count("1 turn left") == 1
    solo = subprocess.run(
        python("-m", "star_attention", "chat", talk, *options[2:]),
        env=os.environ | dict(HF_HUB_OFFLINE="1"),
        input="What is blue?\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert solo.stdout.splitlines() == [second]
    assert f"continuing after 1 turn; the last answer: {first.strip()}" in solo.stderr
