"""Blocks of a few tokens, which people give who mean a number of blocks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from star_attention import StarLLM
from star_attention.cli import app
from tests.engines import bundled_tokenizer, text_model
from tests.evals_cli import save_model
from tests.jsonl import write_lines

WARNING = "block_size 4 makes blocks of 4 tokens, not 4 blocks"


@pytest.mark.parametrize("size", [1, 4, "16", 63])
def test_many_small_blocks_are_warned_of(size: int | str) -> None:
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=size)
    fitting = star.runtime.plan_for(64 * int(size)).block_size * 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        star.runtime.warn_of_small_blocks(fitting)
    with pytest.warns(UserWarning, match=f"block_size {size} makes blocks of {size} token"):
        star.runtime.warn_of_small_blocks(fitting + 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": 64},
        {"block_size": "4k"},
        {"method": "streaming_llm", "block_size": 8},
        {"method": "dense"},
    ],
)
def test_other_settings_are_not_warned_of(settings: dict[str, Any]) -> None:
    StarLLM(text_model(), bundled_tokenizer(), **settings).encode("One. Two. Three.\n" * 40)


def test_engines_over_the_same_model_warn_once() -> None:
    star = StarLLM(text_model(), bundled_tokenizer())
    text = "One. Two. Three.\n" * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        star.with_config(block_size=128).encode(text)
        with pytest.raises(UserWarning, match=WARNING):
            star.with_config(block_size=4).encode(text)
        for size in (4, 8):
            star.with_config(block_size=size).with_config(anchor_size=2).encode(text)


@pytest.mark.filterwarnings("always:block_size:UserWarning")
def test_the_command_line_warns_once(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("One. Two. Three.\n" * 40)
    rows = [{"context": f"{i}. Two.\n" * 60, "query": "Which?", "answers": ["9"]} for i in range(3)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    out, place = str(tmp_path / "out"), ["-m", str(model), "--device", "cpu"]
    for arguments in (
        ["generate", str(text), "--query", "Which?", "--block-size", "4", "--max-new-tokens", "2"],
        ["encode", str(text), "-o", str(tmp_path / "text.star"), "--block-size", "4"],
        [
            "eval",
            "run",
            str(data),
            "--variants",
            "dense,star:4,star:8",
            "-o",
            out,
            "--max-new-tokens",
            "2",
        ],
        ["plan", "--context", "1k", "--block-size", "4"],
    ):
        place_of = place[:2] if arguments[0] == "plan" else place
        result = CliRunner().invoke(app, [*arguments, *place_of])
        assert result.exit_code == 0, result.output
        assert result.stderr.count("makes blocks of") == 1, result.stderr
        assert f"warning: {WARNING}" in result.stderr
