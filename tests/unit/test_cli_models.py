"""Models on the command line: quick refusals, and options that say what to load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import NEEDLE, QUESTION, failed, ok
from tests.engines import BUNDLED
from tests.unit.test_import import RUN_MODULE, in_new_process

NOWHERE = ("/nowhere/model", "models/needle-17n", "./none", "nobody/nothing", "x.gguf")


@pytest.mark.parametrize("model", NOWHERE)
def test_a_mistyped_model_is_refused_before_torch_is_imported(model: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(NEEDLE)
    seen = in_new_process(
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        + RUN_MODULE.format(
            arguments=["generate", "-m", model, str(tmp_path / "book.txt"), "--query", "x"]
        ),
        warnings="ignore",
    )
    assert seen["status"] == 1
    assert not seen["torch"]


def test_refusals_that_need_no_torch(bare_config: Path) -> None:
    commands = [
        ["plan", "-m", "/nowhere/model", "--context", "4k"],
        ["estimate", "-m", "/nowhere/model", "--context", "4k"],
        ["generate", "-m", str(bare_config), __file__, "--query", "x"],
    ]
    code = "".join(RUN_MODULE.format(arguments=command) for command in commands)
    seen = in_new_process(code)
    assert seen["status"] == 1
    assert not seen["torch"]


def test_a_missing_tokenizer_is_found_before_the_weights(tmp_path: Path) -> None:
    for file in (BUNDLED / "config.json", *BUNDLED.glob("model*.json")):
        shutil.copy(file, tmp_path)
    for file in BUNDLED.glob("model*.safetensors"):
        (tmp_path / file.name).write_text("never read")
    (tmp_path / "book.txt").write_text(NEEDLE)
    line = failed("generate", "-m", tmp_path, tmp_path / "book.txt", "--query", "x")
    assert "has no tokenizer, which text input needs" in line


def test_a_subfolder_and_arguments_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "inner").symlink_to(BUNDLED)
    (tmp_path / "book.txt").write_text(NEEDLE)
    outer = ["-m", tmp_path / "outer", "--subfolder", "inner"]
    kwargs = ["--model-kwargs", '{"attn_implementation": "eager"}', "--dtype", "float32"]
    command = ["generate", *outer, *kwargs, "--chat", tmp_path / "book.txt", "--query", QUESTION]
    assert "4910508" in ok(*command).out
    plan = json.loads(ok("plan", *outer, "--context", "4k", "--json").out)
    assert plan["parameters"] > 10_000_000
    assert "has no subfolder outer" in failed("plan", *outer[:-1], "outer", "--context", "4k")


@pytest.mark.parametrize("value", ["{1}", "[]", "3", ""])
def test_arguments_that_are_not_json(value: str, texts: Path) -> None:
    line = failed(
        "generate", "-m", BUNDLED, texts / "book.txt", "--query", "x", "--model-kwargs", value
    )
    assert line.startswith(f"error: --model-kwargs {value!r} is not a JSON object")
    assert line.endswith("""write it like '{"device_map": "auto"}'""")
