"""Refusals that need no weights come before torch is imported, which takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from star_attention import StarLLM, supported
from star_attention.errors import InvalidInputError, ModelNotFoundError, UnsupportedModelError
from star_attention.hf.loading import family_source, files, hub, packages, positions
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
        ({"quantization_config": {"quant_method": "modelopt"}}, [], "NVIDIA ModelOpt's format"),
        ({}, ["--chat"], "this model has no chat template; leave out --chat"),
    ],
    ids=["family", "class", "weights", "template"],
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


def test_a_device_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda _: "2.13.0+cpu")
    packages.check_torch_build("cpu")
    refused(
        InvalidInputError,
        "device 'cuda:1' is not available: torch 2.13.0+cpu was built without CUDA",
        call=lambda: packages.check_torch_build("cuda:1"),
    )
    monkeypatch.setattr(packages, "version", lambda _: "2.13.0")
    packages.check_torch_build("cuda")


# ---------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", [*FAMILIES, *UNUSUAL])
def test_text_refuses_no_family_that_runs(name: str, tmp_path: Path) -> None:
    (FAMILIES | UNUSUAL)[name]().save_pretrained(tmp_path)
    assert family_source.reasons(files.read_json(tmp_path / "config.json")) == []


@pytest.mark.parametrize("name", sorted({*REFUSED} - {"bert"}))
def test_text_tells_which_families_cannot_run(name: str, tmp_path: Path) -> None:
    """Only for BERT the class has to be asked."""
    config = REFUSED[name]()
    config.save_pretrained(tmp_path)
    reasons = family_source.reasons(files.read_json(tmp_path / "config.json"))
    assert reasons
    assert set(reasons) <= set(supported(config).reasons)


@pytest.mark.parametrize("name", [*FAMILIES, *UNUSUAL])
def test_a_file_never_states_fewer_positions_than_its_config(name: str, tmp_path: Path) -> None:
    config = (FAMILIES | UNUSUAL)[name]()
    config.save_pretrained(tmp_path)
    stated = positions.most_positions(files.read_json(tmp_path / "config.json"))
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
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_: Any, **__: Any) -> None:
        request = httpx.Request("HEAD", "https://nowhere")
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=request))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unknown)
    refused(
        ModelNotFoundError,
        "the hub has no such model, or you have no access to it",
        call=lambda: hub.check("nobody/nothing", "config.json", {}),
    )
