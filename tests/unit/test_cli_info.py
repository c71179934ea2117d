"""`star-attention info`, and defaults of options from a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors import safe_open

from star_attention.cli import app, config_file
from tests.command_line import NEEDLE, QUESTION, failed, ok
from tests.engines import BUNDLED, bundled_model, tiny
from tests.unit.test_import import RUN_MODULE, in_new_process


def facts(target: Any, *options: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(ok("info", target, "--json", *options).out)
    return result


def test_a_model() -> None:
    shown = facts(BUNDLED)
    config = bundled_model().config
    expected = {
        "kind": "model",
        "family": "llama",
        "supported": True,
        "reasons": None,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "key_size": config.head_dim,
        "positions": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "parameters": sum(weight.numel() for weight in bundled_model().parameters()),
        "tokenizer": True,
        "chat_template": True,
        "quantization": None,
    }
    assert {name: shown[name] for name in expected} == expected
    assert shown["file_bytes"] > shown["weight_bytes"] == 2 * shown["parameters"]
    text = ok("info", BUNDLED).out
    assert re.search(r"^  supported +yes$", text, re.MULTILINE)
    assert "keys and values per token  5.0 KiB" in text


def test_models_that_cannot_run(tmp_path: Path, bare_config: Path) -> None:
    config = json.loads((bare_config / "config.json").read_text())
    assert facts(bare_config)["tokenizer"] is False
    assert facts(bare_config)["file_bytes"] is None
    config |= {"quantization_config": {"quant_method": "awq"}}
    (bare_config / "config.json").write_text(json.dumps(config))
    assert facts(bare_config)["quantization"] == "awq"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    shown = facts(tmp_path)
    assert not shown["supported"]
    assert "attends in both directions" in " ".join(shown["reasons"])
    assert "supported" in ok("info", tmp_path).out
    line = failed("info", "/nowhere/model")
    assert line.startswith("error: there is no model folder /nowhere/model")


def test_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny("llama").save_pretrained(tmp_path / "base")
    base = type(tiny("llama")).from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "lora")
    shown = facts(tmp_path / "lora")
    assert shown["base"] == str(tmp_path / "base")
    assert shown["supported"]


def test_a_saved_context(texts: Path) -> None:
    """From its header alone, without torch."""
    file = texts / "book.star"
    shown = facts(file)
    with safe_open(file, framework="pt") as tensors:
        tokens = len(tensors.get_tensor("token_ids"))
    expected = {
        "kind": "saved context",
        "file_bytes": file.stat().st_size,
        "context_tokens": tokens,
        "blocks": -(-tokens // 256),
        "block_size": 256,
        "method": "star",
        "dtype": "float32",
        "kv_dtype": "float32",
        "family": "llama",
        "model": str(BUNDLED),
        "adapter": None,
        "chat": True,
        "saved_by_ranks": 1,
    }
    assert {name: shown[name] for name in expected} == expected
    assert "context tokens" in ok("info", file).out
    seen = in_new_process(RUN_MODULE.format(arguments=["info", str(file)]))
    assert seen["status"] == 0
    assert not seen["torch"]


def test_what_is_neither(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(NEEDLE)
    assert "is not a saved context" in failed("info", tmp_path / "book.txt")
    assert "there is no saved context at" in failed("info", tmp_path / "none.star")


# ------------------------------------------------------------------------- the settings file


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a settings file, which is empty."""
    file = tmp_path / "settings.toml"
    file.write_text("")
    monkeypatch.setenv("STAR_ATTENTION_CONFIG", str(file))
    return file


def test_defaults_from_a_file(settings: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.write_text(
        f'model = "{BUNDLED}"\ndtype = "float32"\n[generate]\nmax-new-tokens = 3\nchat = true\n'
        'stop = ["zebra"]\n[eval.run]\nskip-too-long = true\n'
    )
    command = ["generate", texts / "book.txt", "--query", QUESTION, "--json"]
    assert len(json.loads(ok(*command).out)["token_ids"]) == 3
    assert len(json.loads(ok(*command, "--max-new-tokens", "2").out)["token_ids"]) == 2
    assert json.loads(ok("plan", "--context", "4k", "--json").out)["parameters"] > 10_000_000
    # The environment comes before the file, and a saved context's own model before both.
    monkeypatch.setenv("STAR_ATTENTION_MODEL", "/nowhere")
    assert "no model folder /nowhere" in failed(*command)
    settings.write_text('model = "/nowhere"\n')
    ok("ask", texts / "book.star", "--query", QUESTION, "--max-new-tokens", "2")


def test_measurements_do_not_take_the_default_model(settings: Path) -> None:
    """`bench --shapes` excludes a model, and the demo has one of its own."""
    root: Any = typer.main.get_command(app)
    settings.write_text('model = "x"\n[bench.decode]\nmodel = "y"\n')
    defaults = config_file.defaults(root)
    assert defaults["generate"] == {"model": "x"}
    assert defaults["bench"]["decode"] == {"model": "y"}
    assert defaults["bench"]["prefill"] == defaults["demo"] == defaults["ask"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 1", "no command has an option --modle"),
        ("[generate]\nranks = 3", "generate has no option --ranks; see"),
        ("[generat]\nseed = 3", "there is no command generat"),
        ("seed = ", "cannot be read: Invalid value"),
    ],
)
def test_mistakes_in_the_file(text: str, message: str, settings: Path) -> None:
    settings.write_text(text)
    line = failed("plan", "-m", BUNDLED, "--context", "4k")
    assert str(settings) in line
    assert message in line


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAR_ATTENTION_CONFIG", str(tmp_path / "none.toml"))
    message = f"error: there is no settings file {tmp_path / 'none.toml'}; correct or unset"
    assert failed("plan", "--context", "4k").startswith(message)
    monkeypatch.delenv("STAR_ATTENTION_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "star-attention").mkdir()
    (tmp_path / "star-attention" / "config.toml").write_text(f'model = "{BUNDLED}"\n')
    assert ok("plan", "--context", "4k").out
