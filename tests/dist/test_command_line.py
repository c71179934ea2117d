"""The command under torchrun: what every rank would say is said once, misuse is told as on one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.evals.runs import run_folder
from tests.engines import BUNDLED


def torchrun(*arguments: str | Path, ranks: int = 2, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *("-m", "star_attention", *map(str, arguments)),
        ],
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
    done = torchrun(
        *("encode", "-m", BUNDLED, "--chat", "--method", "ring", "--block-size", "64", book(tmp_path), "-o", saved)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    assert sum("have no effect on ring attention" in line for line in lines) == 1
    assert [line for line in lines if line.startswith("encoded: ")][-1] == "encoded: all 2 ranks are done"
    assert any(line.startswith("context ") and "tok, 2 ranks, ring, encode " in line for line in lines)
    alone = subprocess.run(
        [sys.executable, "-m", "star_attention", "encode", "-m", BUNDLED, book(tmp_path), "-o", saved],
        env=os.environ | dict(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert alone.returncode == 1
    assert "a folder that several ranks saved, and one process writes a file" in alone.stderr
    assert "loading" not in alone.stderr, "before any work"


def test_misuse_is_told_once_and_without_a_traceback(tmp_path: Path) -> None:
    """Also where the rank that tells it is late: the launcher would end it with the first that ends."""
    text = book(tmp_path)
    late = "import os, time\ntime.sleep(1.5 * (os.environ.get('LOCAL_RANK') == '0'))\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    for arguments, message in (
        (["generate", "-m", BUNDLED, text], "Invalid value for --query or --query-file: give a query"),
        (["generate", "-m", BUNDLED, text, "--qury", "x"], "No such option: --qury"),
        (["generate", "-m", BUNDLED, text, "--query", "x", "--block-size", "4x"], "block_size '4x' is not a number"),
    ):
        done = torchrun(*arguments, PYTHONPATH=path)
        assert done.returncode != 0
        said = " ".join(done.stderr.replace("│", " ").split())
        assert said.count(message) == 1, done.stderr[-3000:]
        ours = done.stderr.partition("torch/distributed/elastic")[0]  # (torchrun's own report has a traceback)
        assert 'star_attention/cli' not in done.stderr, ours


def test_evaluations_on_several_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    arguments = [
        *("eval", "ruler", "-m", BUNDLED, "--dtype", "float32", "--task", "niah_single_1,vt", "--length", "768"),
        *("--samples", "2", "--max-new-tokens", "6", "--variants", "star:/4,ring", "--device", "cpu", "--out"),
    ]
    done = torchrun(*arguments, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report.html") == 1
    assert sum("8 of 8 answers" in line for line in done.stderr.splitlines()) == 1
    assert CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "one")]).exit_code == 0
    two, one = (list(run_folder.read_predictions(tmp_path / name)) for name in ("two", "one"))
    assert [(line.key, line.prediction) for line in two] == [(line.key, line.prediction) for line in one]
    assert run_folder.read_run(tmp_path / "two")["sessions"][0]["ranks"] == 2
