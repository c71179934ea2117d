"""Models on the command line: quick refusals, and options that say what to load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from star_attention import StarLLM
from tests.command_line import NEEDLE, QUESTION, failed, ok
from tests.engines import BUNDLED, bundled_model, bundled_tokenizer
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


def test_a_text_far_too_long_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 80_000)
    arguments = ["generate", "-m", str(BUNDLED), str(tmp_path / "long.txt"), "--query", "x"]
    seen = in_new_process(RUN_MODULE.format(arguments=arguments), warnings="ignore")
    assert seen["status"] == 1
    assert not seen["torch"]
    line = failed(*arguments)
    assert line.startswith("error: the context has at least 80,001 tokens, more than the model's")


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
    assert failed("ask", texts / "book.star", "--query", "x", "--model-kwargs", value) == line


# ------------------------------------------------------------------------------------- ask


ASK = ["--query", QUESTION, "--max-new-tokens", "24"]


@pytest.fixture
def saved(texts: Path) -> Path:
    return texts / "book.star"


def test_a_saved_context_knows_its_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the working folder, and whatever the default model."""
    expected = ok("ask", saved, "-m", BUNDLED, *ASK).out
    assert "4910508" in expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAR_ATTENTION_MODEL", "/nowhere")
    assert ok("ask", saved, *ASK).out == expected


def test_a_saved_context_of_a_model_that_has_moved(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(BUNDLED)
    (tmp_path / "book.txt").write_text(NEEDLE)
    context = tmp_path / "book.star"
    model = ["-m", tmp_path / "model", "--dtype", "float32", "--chat"]
    ok("encode", *model, tmp_path / "book.txt", "-o", context)
    (tmp_path / "model").unlink()
    line = failed("ask", context, *ASK)
    assert f"{context} was encoded with the model {tmp_path / 'model'}, which cannot be" in line
    assert line.endswith("; if it is elsewhere now, give it with -m")
    assert "4910508" in ok("ask", context, "-m", BUNDLED, *ASK).out


def test_a_context_of_a_model_that_was_loaded_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    star = StarLLM(bundled_model(), bundled_tokenizer())
    star.encode(NEEDLE).save(tmp_path / "book.star")
    command = ["ask", tmp_path / "book.star", "--query", "<|q|>What?<|a|>"]
    message = f"error: {tmp_path / 'book.star'} does not name its model; give it with -m"
    assert failed(*command) == message
    monkeypatch.setenv("STAR_ATTENTION_MODEL", str(BUNDLED))
    ok(*command)


def test_another_model_is_refused_before_torch_is_imported(saved: Path, tmp_path: Path) -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    command = ["ask", saved, "-m", tmp_path, *ASK]
    layers = config["num_hidden_layers"]
    message = f"it differs in config.num_hidden_layers: {layers} in the context, 3 in this model"
    assert message in failed(*command)
    seen = in_new_process(RUN_MODULE.format(arguments=[str(part) for part in command]))
    assert seen["status"] == 1
    assert not seen["torch"]
    line = failed("ask", saved, "--dtype", "bfloat16", *ASK)
    assert "it differs in dtype: float32 in the context, bfloat16 as asked for" in line


def test_the_default_model(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAR_ATTENTION_MODEL", str(BUNDLED))
    command = ["generate", texts / "book.txt", "--chat", "--dtype", "float32", *ASK]
    assert "4910508" in ok(*command).out
    assert ok("plan", "--context", "4k").out
    assert "there is no model folder /nowhere" in failed(*command, "-m", "/nowhere")
