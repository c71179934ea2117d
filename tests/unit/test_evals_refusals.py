"""Refusals of `star-attention eval`: before anything slow, and without an empty folder."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from star_attention.evals.runs.sources import SuiteSource
from tests.engines import bundled_tokenizer, text_model
from tests.evals_cli import SHORT, error, save_model
from tests.jsonl import write_lines

GOOD = {"context": "It is 7.\n" * 9, "query": "What is it?", "answers": ["7"]}

_WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from typer.testing import CliRunner
from star_attention.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, ["eval", *arguments])
    print(result.exit_code, result.stderr.strip().splitlines()[-1])
"""


def test_what_needs_no_model_is_refused_without_torch(tmp_path: Path) -> None:
    """Importing torch and transformers takes seconds."""
    good = str(write_lines(tmp_path / "good.jsonl", [GOOD]))
    bad = str(write_lines(tmp_path / "bad.jsonl", [GOOD, {**GOOD, "context": "\ud83d"}]))
    (tmp_path / "file").write_text("")
    model, out = ["-m", str(tmp_path / "none")], ["--out", str(tmp_path / "out")]
    expected = {
        ("run", bad, *out): r"line 2: field 'context' holds a lone surrogate",
        ("run", str(tmp_path / "gone.jsonl"), *out): "gone.jsonl does not exist; check the path",
        ("run", good, *out, "--format", "xml"): "format 'xml' is unknown",
        ("run", good, *out, "--variants", "stat:/4"): "method 'stat' is unknown",
        (
            "run",
            good,
            *out,
            "--variants",
            "star:1k:2k",
        ): "has an anchor of 2,048 tokens and blocks of",
        ("run", good, *out, "--max-new-tokens", "0"): "max_new_tokens 0 is not a positive",
        ("run", good, "--out", str(tmp_path / "file" / "x")): "is not a folder",
        ("ruler", *out, "--task", "nail"): "task 'nail' of ruler is unknown",
        ("ruler", *out, "--length", "4x"): "length '4x' is not",
        ("ruler", *out, "--task", "qa_1", "--squad", "gone.json"): "'gone.json' does not exist",
    }
    commands = json.dumps([[*arguments, *model] for arguments in expected])
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, commands], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    for (arguments, message), line in zip(expected.items(), lines, strict=True):
        assert line.startswith("1 error: "), (arguments, line)
        assert message in line, (arguments, line)
    assert not (tmp_path / "out").exists()


def test_the_model_is_looked_at_before_samples_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making samples of 16k tokens takes minutes."""
    model = save_model(tmp_path / "model")
    bare = copy.deepcopy(bundled_tokenizer())
    bare.chat_template = None
    for part in (text_model(), bare):
        part.save_pretrained(tmp_path / "bare")
    text_model().save_pretrained(tmp_path / "mute")
    positions = text_model().config.max_position_embeddings

    def load(*_: object, **__: object) -> None:
        raise AssertionError("samples are made")

    monkeypatch.setattr(SuiteSource, "load", load)
    out = ("--out", tmp_path / "out", *SHORT)
    too_long = str(positions + 1000)
    message = error(model, "ruler", "--task", "vt", "--length", f"1k,{too_long}", *out)
    assert f"samples of {positions + 1000:,} tokens are too long for the model" in message
    assert (
        f"{positions:,} positions; use a smaller length, skip them with --skip-too-long" in message
    )
    message = error(model, "ruler", "--length", too_long, "--skip-too-long", *out)
    assert message.endswith("positions; use a smaller length")
    message = error(model, "ruler", "--length", "1k", "--variants", "star:/4:512", *out)
    assert "an anchor of 512 tokens and blocks of 256" in message
    assert "no chat template" in error(tmp_path / "bare", "ruler", "--length", "1k", "--chat", *out)
    assert "has no tokenizer" in error(tmp_path / "mute", "ruler", "--length", "1k", *out)
    assert str(tmp_path / "gone") in error(tmp_path / "gone", "ruler", *out)
    assert not (tmp_path / "out").exists()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    long = GOOD | {"context": GOOD["context"] * 20_000}
    data = write_lines(tmp_path / "data.jsonl", [long])
    assert "samples are" in error(model, "run", data, "--out", tmp_path / "a" / "b", *SHORT)
    assert not (tmp_path / "a").exists()
