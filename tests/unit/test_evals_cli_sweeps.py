"""`star-attention eval sweep`, `ablations` and `perplexity`, with a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from star_attention.evals.runs.predictions import sha256
from star_attention.evals.runs.run_folder import FIGURES
from star_attention.evals.runs.sweeps import TABLE_4
from star_attention.evals.runs.variants import parse
from tests.evals_cli import SHORT, error, invoke, ok, predictions, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_sweeps_are_drawn(model: Path, tmp_path: Path) -> None:
    arguments = ["sweep", "--task", "niah_single_1", "--length", "512", "--samples", "1", *SHORT]
    ok(model, *arguments, "--blocks", "/4,/2", "--out", tmp_path / "blocks")
    assert {line.variant for line in predictions(tmp_path / "blocks")} == {
        "dense",
        "star:/4",
        "star:/2",
    }
    assert (tmp_path / "blocks" / FIGURES / "blocks.png").is_file()
    ok(model, *arguments, "--blocks", "/4", "--anchors", "0,=", "--out", tmp_path / "anchors")
    assert {line.variant for line in predictions(tmp_path / "anchors")} == {
        "dense",
        "star:/4:0",
        "star:/4",
    }
    assert (tmp_path / "anchors" / FIGURES / "anchors.png").is_file()


def test_sweeps_take_other_suites_and_their_data(model: Path, tmp_path: Path) -> None:
    background = tmp_path / "text.txt"
    background.write_text(
        "A cold wind comes down from the north. There is bread on the table. " * 200
    )
    arguments = [
        "--suite",
        "babilong",
        "--length",
        "768",
        "--samples",
        "1",
        "--background",
        background,
        *SHORT,
    ]
    ok(model, "sweep", *arguments, "--blocks", "/2", "--out", tmp_path / "out")
    assert {line.task for line in predictions(tmp_path / "out")} == {
        "qa1",
        "qa2",
        "qa3",
        "qa4",
        "qa5",
    }
    assert {line.meta["prose"] for line in predictions(tmp_path / "out")} == {"text.txt"}


@pytest.mark.parametrize("command", [["ruler"], ["sweep", "--blocks", "/2"]])
def test_held_out_words_and_tasks_with_spaces(
    model: Path, tmp_path: Path, command: list[str]
) -> None:
    arguments = [
        "--task",
        "niah_single_1, niah_multikey_1",
        "--length",
        "768",
        "--samples",
        "1",
        "--words",
        "eval",
    ]
    ok(model, *command, *arguments, "--out", tmp_path, *SHORT)
    lines = predictions(tmp_path)
    assert {line.task for line in lines} == {"niah_single_1", "niah_multikey_1"}
    assert all(line.meta["words"].endswith(", eval") for line in lines)


def test_the_table_of_ablations(model: Path, tmp_path: Path) -> None:
    arguments = [
        "ablations",
        "--task",
        "niah_single_1",
        "--length",
        "512",
        "--samples",
        "1",
        "--out",
        tmp_path,
        *SHORT,
    ]
    ok(model, *arguments)
    variants = [parse(line.variant) for line in predictions(tmp_path)]
    assert len(variants) == 1 + len(TABLE_4)
    assert {variant.anchor for variant in variants} >= {
        None,
        "none",
        "constant",
        "random",
        "shuffled",
        "previous-block",
    }
    assert {variant.anchor_positions for variant in variants} == {None, "random", "previous-block"}


def test_perplexity(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(
        "A cold wind comes down from the north, and there is bread on the table.\n" * 40
    )
    arguments = [
        "perplexity",
        text,
        "--length",
        "128",
        "--tail",
        "32",
        "--windows",
        "3",
        "--variants",
        "dense,star:/4",
    ]
    result = ok(model, *arguments, "--out", tmp_path / "out")
    assert result.stdout.startswith("3 windows of 128 tokens, the last 32 predicted")
    dense, star = json.loads((tmp_path / "out" / "perplexity.json").read_text())["rows"]
    assert dense["difference"] is None
    assert (star["block_size"], len(star["windows"])) == (32, 3)
    assert f"{dense['perplexity']:.3f}" in result.stdout
    content = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert (content["text_sha256"], content["ranks"]) == (sha256(text.read_text()), 1)
    assert set(content["versions"]) == {"star_attention", "torch", "transformers"}
    assert "already exists; give another folder" in error(
        model, *arguments, "--out", tmp_path / "out"
    )


def test_anchors_need_one_block(model: Path, tmp_path: Path) -> None:
    result = invoke(model, "sweep", "--anchors", "0,=", "--out", tmp_path)
    assert result.exit_code == 2
    assert "give --blocks /4" in result.stderr
