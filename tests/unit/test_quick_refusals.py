"""Refusals that need no weights come before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from star_attention import StarLLM, supported
from star_attention.errors import InvalidInputError, ModelNotFoundError, UnsupportedModelError
from star_attention.hf.loading import (
    checks,
    config_file,
    family_source,
    files,
    hub,
    packages,
    positions,
)
from star_attention.hf.loading.load import load_tokenizer
from tests.command_line import failed
from tests.engines import BUNDLED
from tests.families import FAMILIES, REFUSED, UNUSUAL
from tests.model_folders import complete_model, edit
from tests.refusals import refused
from tests.unit.test_import import RUN_MODULE, in_new_process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return complete_model(tmp_path / "model")


def load(path: Any, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(path, **settings)


GENERATE = ["generate", "-m", str(BUNDLED), __file__, "--query", "x"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*GENERATE, "--rope-scaling", "yarm:4"], "rope scaling 'yarm:4' is unknown"),
        ([*GENERATE, "--device", "foo"], "device 'foo' is unknown; use auto, cpu, cuda or cuda:1"),
        (["bench", "prefill", "-m", "models/nope"], "there is no model folder models/nope"),
        (["bench", "decode", "-m", str(BUNDLED), "--dtype", "foo"], "dtype 'foo' is unknown"),
        ([*GENERATE, "--rope-scaling", "yarn:0.5"], "factor 0.5; expected a number of at least 1"),
        (
            ["plan", "-m", str(BUNDLED), "--context", "4k", "--rope-scaling", "yarn"],
            "rope scaling 'yarn' is unknown",
        ),
        (
            ["eval", "niah", "-m", str(BUNDLED), "--length", "128k", "--out", "never"],
            "samples of 131,072 tokens are too long for the model, which has 65,536 positions",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_on_the_command_line(command: list[str], message: str) -> None:
    assert message in failed(*command)
    seen = in_new_process(RUN_MODULE.format(arguments=command))
    assert seen["status"] == 1
    assert not seen["torch"]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"model_type": "mamba"}, [], "it keeps a running state"),
        ({"architectures": ["LlamaForSequenceClassification"]}, [], "not trained to generate"),
        ({"is_causal": False}, [], "it attends in both directions"),
        ({"quantization_config": {"quant_method": "modelopt"}}, [], "NVIDIA ModelOpt's format"),
        ({}, ["--chat"], "this model has no chat template; leave out --chat"),
    ],
    ids=["family", "class", "direction", "weights", "template"],
)
def test_by_the_files_of_a_model(
    fields: dict[str, Any], options: list[str], message: str, folder: Path
) -> None:
    edit(folder, **fields)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    command = ["generate", "-m", str(folder), __file__, "--query", "x", *options]
    assert message in failed(*command)
    seen = in_new_process(RUN_MODULE.format(arguments=command))
    assert seen["status"] == 1
    assert not seen["torch"]


@pytest.mark.parametrize("text", ["", "{", '{"model": [1, 2'])
def test_a_tokenizer_that_is_not_whole(text: str, folder: Path) -> None:
    """In the words that it has when transformers reads it."""
    checks.check_tokenizer(files.locate(folder))
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelNotFoundError) as quick:
        checks.check_tokenizer(files.locate(folder))
    with pytest.raises(ModelNotFoundError) as slow:
        load_tokenizer(folder)
    assert str(quick.value) == str(slow.value)
    command = ["generate", "-m", str(folder), __file__, "--query", "x"]
    seen = in_new_process(RUN_MODULE.format(arguments=command))
    assert seen["status"] == 1
    assert not seen["torch"]


def test_kinds_of_devices_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(packages, "entry_points", lambda group: [])
    with pytest.raises(RuntimeError) as error:
        torch.device("foo")
    kinds = str(error.value).partition("Expected one of ")[2].partition(" device type")[0]
    assert len(kinds.split(", ")) > 10
    for kind in kinds.split(", "):
        if kind != "cuda":
            packages.check_device_is_here(kind)
    monkeypatch.setattr(packages, "entry_points", lambda group: ["a package"])
    packages.check_device_is_here("foo")


def test_a_device_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda _: "2.13.0+cpu")
    packages.check_device_is_here("cpu")
    refused(
        InvalidInputError,
        "device 'cuda:1' is not available: torch 2.13.0+cpu was built without CUDA",
        call=lambda: packages.check_device_is_here("cuda:1"),
    )


def test_a_gpu_that_is_hidden_or_has_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda _: "2.13.0+cu128")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    libraries: list[str] = []
    monkeypatch.setattr(packages.ctypes, "CDLL", libraries.append)
    packages.check_device_is_here("cuda")
    assert libraries == ["nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"]

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(packages.ctypes, "CDLL", missing)
    refused(
        InvalidInputError,
        "device 'cuda' is not available: this machine has no driver of NVIDIA (libcuda)",
        call=lambda: packages.check_device_is_here("cuda"),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    refused(
        InvalidInputError,
        "CUDA_VISIBLE_DEVICES=-1 hides every GPU; unset it, or use cpu",
        call=lambda: packages.check_device_is_here("cuda:0"),
    )
    monkeypatch.setattr(packages, "version", lambda _: "2.13.0+rocm6.4")
    packages.check_device_is_here("cuda")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "config.json is not valid JSON (Expecting property name"),
        (
            '{"model_type": "llama"',
            "config.json is not valid JSON (Expecting ',' delimiter: line 1",
        ),
        pytest.param(
            "[" * 100_000,
            "config.json is not valid JSON (maximum recursion depth",
            id="deeply nested",
        ),
        ("[1]", "config.json holds [1], expected an object of settings"),
        ("caf\udce9", "config.json is not UTF-8 text"),
        ("{}", "config.json does not say what kind of model it is (model_type)"),
        ('{"model_type": 5}', "config.json does not say what kind of model it is (model_type)"),
        (
            '{"model_type": "of-tomorrow"}',
            "does not know models of type 'of-tomorrow'; update transformers, or check model_type",
        ),
        (
            '{"model_type": "llama", "num_hidden_layers": "12"}',
            "config.json has num_hidden_layers '12', expected a whole number",
        ),
        (
            '{"model_type": "gemma3", "text_config": {"vocab_size": true}}',
            "config.json has vocab_size True, expected a whole number",
        ),
        (
            '{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 6}',
            "hidden_size 100 is not a multiple of num_attention_heads 6",
        ),
    ],
)
def test_a_config_that_transformers_refuses(text: str, problem: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(
        ModelNotFoundError,
        f"no model could be read at {folder}: ",
        problem,
        call=lambda: files.locate(folder),
    )
    command = ["info", str(folder)]
    assert problem in " ".join(failed(*command).split())
    seen = in_new_process(RUN_MODULE.format(arguments=command))
    assert seen["status"] == 1
    assert not seen["torch"]


def test_text_and_transformers_agree_on_a_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids refusing a config by its text that transformers would take."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert all(config_file.family_file(name, "modeling") for name in ("llama", "gpt_neox"))
    edit(folder, hidden_size=100, num_attention_heads=6)
    with pytest.raises(Exception, match="not a multiple"):
        AutoConfig.from_pretrained(folder)
    # Qwen 3 does not ask for it.
    edit(folder, model_type="qwen3", head_dim=16)
    assert AutoConfig.from_pretrained(folder).hidden_size == 100
    assert config_file.read(folder, own_code=False)["hidden_size"] == 100
    monkeypatch.delitem(sys.modules, "transformers.models.auto.configuration_auto")
    assert not config_file.is_known("of-tomorrow")
    known = [name for name in CONFIG_MAPPING_NAMES if config_file.is_known(name)]
    assert known == [*CONFIG_MAPPING_NAMES]


def test_families_that_a_user_registers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class OwnConfig(LlamaConfig):
        model_type = "my-own-llama"

    assert not config_file.is_known("my-own-llama")
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    AutoConfig.register("my-own-llama", OwnConfig)
    assert config_file.is_known("my-own-llama")


# ---------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", [*FAMILIES, *UNUSUAL])
def test_text_refuses_no_family_that_runs(name: str, tmp_path: Path) -> None:
    (FAMILIES | UNUSUAL)[name]().save_pretrained(tmp_path)
    assert family_source.reasons(config_file.read_json(tmp_path / "config.json")) == []


@pytest.mark.parametrize("name", sorted({*REFUSED} - {"bert"}))
def test_text_tells_which_families_cannot_run(name: str, tmp_path: Path) -> None:
    """Only for BERT the class has to be asked."""
    config = REFUSED[name]()
    config.save_pretrained(tmp_path)
    reasons = family_source.reasons(config_file.read_json(tmp_path / "config.json"))
    assert reasons
    assert set(reasons) <= set(supported(config).reasons)


@pytest.mark.parametrize("name", [*FAMILIES, *UNUSUAL])
def test_a_file_never_states_fewer_positions_than_its_config(name: str, tmp_path: Path) -> None:
    config = (FAMILIES | UNUSUAL)[name]()
    config.save_pretrained(tmp_path)
    stated = positions.most_positions(config_file.read_json(tmp_path / "config.json"))
    limit = positions.max_positions(config.get_text_config(decoder=True))
    assert stated is None or limit is None or stated >= limit


def test_configs_that_say_nothing_of_positions() -> None:
    for fields in ({}, {"max_position_embeddings": "x"}, {"rope_scaling": 4}):
        assert positions.most_positions(fields) is None
    odd = {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": "four"}}
    assert positions.most_positions(odd) is None


# ----------------------------------------------------------------------------------------- weights


def renamed(folder: Path, old: str, *new: str) -> None:
    """Give a model's weights other names, as formats of quantized weights do."""
    weights = load_file(folder / "model.safetensors")
    tensor = weights.pop(old)
    save_file(
        weights | {name: tensor.clone() for name in new},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


WEIGHT = "model.layers.0.self_attn.q_proj.weight"
LAYER = WEIGHT.removesuffix(".weight")


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        ([WEIGHT, f"{LAYER}.scales", f"{LAYER}.biases"], {}, "quantized in MLX's format"),
        (
            [WEIGHT, f"{LAYER}.scales", f"{LAYER}.biases"],
            {"quantization_config": {"group_size": 64, "bits": 4}},
            "quantized in MLX's format",
        ),
        (
            [f"{LAYER}.qweight", f"{LAYER}.scales"],
            {},
            f"are quantized (they have {LAYER}.qweight), but config.json does not say how",
        ),
        ([WEIGHT, f"{LAYER}.weight_scale"], {}, "are quantized (they have"),
        ([WEIGHT], {"quantization_config": {"bits": 4}}, "without quant_method"),
        (
            [WEIGHT],
            {"quantization_config": {"quant_method": "exl2"}},
            "ExLlamaV2's format, which transformers cannot load; give the original model",
        ),
        (
            [WEIGHT],
            {"quantization_config": {"quant_method": "tomorrow"}},
            "quantized with tomorrow, which this version of transformers does not know",
        ),
    ],
)
def test_quantized_weights_that_would_be_read_as_plain_ones(
    names: list[str], fields: dict[str, Any], message: str, folder: Path
) -> None:
    """Forbids what transformers does: it drops scales that it does not know, and computes on."""
    renamed(folder, WEIGHT, *names)
    edit(folder, **fields)
    refused(ModelNotFoundError, message, call=lambda: load(folder))


def test_a_model_that_does_not_generate(folder: Path) -> None:
    edit(folder, architectures=["LlamaForSequenceClassification"])
    refused(UnsupportedModelError, "it is a LlamaForSequence", call=lambda: load(folder))
    assert not supported(folder)
    edit(folder, architectures=["LlamaModel"], tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = "lack lm_head.weight; copy or download it again (it may be LlamaModel, which"
    refused(ModelNotFoundError, message, call=lambda: load(folder))


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "the model's path is empty; give"),
        ("~/none/model", "~ is not expanded here: write the whole path"),
        ("https://huggingface.co/an/id", "give its hub id, an/id"),
        ("hf://an/id", "give its hub id, an/id"),
    ],
)
def test_paths_that_are_not_paths(path: str, message: str) -> None:
    refused(ModelNotFoundError, message, call=lambda: files.locate(path))


def test_a_hub_id_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_: Any, **__: Any) -> None:
        # The HTTP client, whose response this is, differs between releases.
        response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unknown)
    refused(
        ModelNotFoundError,
        "the hub has no such model, or you have no access to it",
        call=lambda: hub.check("nobody/nothing", "config.json", {}),
    )
