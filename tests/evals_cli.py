"""`star-attention eval` in this process, with a small random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.evals.runs.predictions import Prediction, read_predictions
from tests.engines import bundled_tokenizer, text_model

SHORT = ("--max-new-tokens", "2", "--quiet")


def save_model(folder: Path) -> Path:
    """Save the model and its tokenizer."""
    text_model().save_pretrained(folder)
    bundled_tokenizer().save_pretrained(folder)
    return folder


def invoke(model: Path, *arguments: object) -> Any:
    command, *others = map(str, arguments)
    return CliRunner().invoke(app, ["eval", command, *others, "-m", str(model), "--device", "cpu"])


def ok(model: Path, *arguments: object) -> Any:
    result = invoke(model, *arguments)
    assert result.exit_code == 0, result.output
    return result


def error(model: Path, *arguments: object) -> str:
    result = invoke(model, *arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def predictions(folder: Path) -> list[Prediction]:
    return list(read_predictions(folder))
