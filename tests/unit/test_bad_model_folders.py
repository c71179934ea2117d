"""Model folders that are missing, incomplete or broken, and devices that are not available."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_attention import StarLLM, supported
from star_attention.errors import (
    InvalidInputError,
    ModelNotFoundError,
)
from tests.engines import ids, tiny
from tests.model_folders import complete_model
from tests.refusals import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return complete_model(tmp_path / "model")


def load(folder: object, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(folder, **settings)  # type: ignore[arg-type]


def test_a_complete_folder_loads(folder: Path) -> None:
    star = load(folder)
    assert star.tokenizer is not None
    assert len(star.encode(ids(50))) == 50


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "{}/none",
            "there is no model folder {}/none; check the path, or give a hub id like organization/",
        ),
        ("./none", "there is no model folder ./none"),
        ("no/such/folder", "there is no model folder no/such/folder"),
        ("{}/config.json", "config.json is a file; give the model's folder, or a hub id"),
        (
            "{}/..",
            "holds no config.json, but its subfolder model does: give {}/../model, or --subfolder"
            " model (in Python: subfolder='model')",
        ),
        ("x" * 5000, "File name too long"),
        (None, "None is not a model: expected the path of its folder or a hub id, got NoneType"),
        (5, "5 is not a model: expected the path of its folder or a hub id, got int"),
    ],
)
def test_a_path_without_a_model(path: Any, message: str, folder: Path) -> None:
    path = path.format(folder) if isinstance(path, str) else path
    refused(ModelNotFoundError, message.format(folder), call=lambda: load(path))
    if isinstance(path, str):
        refused(ModelNotFoundError, message.format(folder), call=lambda: supported(path))


def test_a_hub_id_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheckout the documentation.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    monkeypatch.setattr("star_attention.hf.loading.hub.check", lambda *_, **__: None)
    message = (
        "there is no folder organization/name here, and it could not be loaded as a hub id:"
        " We couldn't connect to the hub; check the path or the id, and for a hub id the network"
        " and your access to it"
    )
    refused(ModelNotFoundError, message, call=lambda: load("organization/name"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\udcff",
        "null",
        "5",
        "[]",
        "{}",
        '{"model_type": "nobodys"}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "llama", "hidden_size": -5}',
    ],
)
def test_a_broken_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(ModelNotFoundError, f"no model could be read at {folder}: ", call=lambda: load(folder))
    refused(
        ModelNotFoundError, f"no model could be read at {folder}: ", call=lambda: supported(folder)
    )


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = (
        f"the folder {folder} holds a config.json, but no weights (model.safetensors); copy or"
        " download them, too"
    )
    refused(ModelNotFoundError, message, call=lambda: load(folder))


@pytest.mark.parametrize("size", [0, 5, 100, -1, -5000])
def test_truncated_weights(size: int, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused(
        ModelNotFoundError, f"the model at {folder} could not be loaded", call=lambda: load(folder)
    )


def test_weights_that_are_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "a page saying that the download needs a login\n" * 99
    )
    refused(
        ModelNotFoundError, f"the model at {folder} could not be loaded", call=lambda: load(folder)
    )


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny("llama").save_pretrained(folder, max_shard_size="100KB")
    assert load(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(ModelNotFoundError, shard.name, call=lambda: load(folder))


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_a_missing_weight(name: str, folder: Path) -> None:
    """Forbids answers of a partly random model: transformers only prints a table."""
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = (
        f"the model at {folder} is incomplete: its files lack {name}; copy or download it again"
    )
    refused(ModelNotFoundError, message, call=lambda: load(folder))
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(ModelNotFoundError, "is incomplete", "and 29 more", call=lambda: load(folder))


def test_a_weight_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 5)
    weights["model.norm.weight"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = [
        f"the model at {folder} does not fit its config.json: model.layers.1.self_attn.q_proj",
        "weight has the shape (3, 5), expected (96, 72) (2 weights differ)",
    ]
    refused(ModelNotFoundError, *message, call=lambda: load(folder))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_broken_tokenizer(file: str, text: str, folder: Path) -> None:
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    refused(
        ModelNotFoundError,
        f"the tokenizer at {folder} could not be read: ",
        call=lambda: load(folder),
    )


def test_half_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(
        ModelNotFoundError,
        f"the tokenizer at {folder} could not be read: ",
        call=lambda: load(folder),
    )


def test_no_tokenizer_is_needed_for_token_ids(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    star = load(folder)
    assert star.tokenizer is None
    assert len(star.encode(ids(50))) == 50
    refused(InvalidInputError, "text needs a tokenizer", call=lambda: star.encode("text"))


BAD_SETTINGS = [
    (
        dict(dtype="float64"),
        "dtype 'float64' is unknown; use one of auto, float32, bfloat16, float16",
    ),
    (dict(dtype=torch.int8), "dtype 'torch.int8' is unknown; use one of auto"),
    (dict(device="quantum"), "device 'quantum' is unknown; use auto, cpu, cuda or cuda:1"),
    (dict(device="gpu"), "device 'gpu' is unknown; use auto, cpu, cuda or cuda:1"),
    (dict(device="cuda1"), "device 'cuda1' is unknown; use auto, cpu, cuda or cuda:1"),
    (dict(device=""), "device '' is unknown"),
    (dict(device=None), "device None is unknown"),
    (dict(device="meta"), "device 'meta' stores no values; use auto, cpu or cuda"),
    (dict(device="hpu"), "device 'hpu' cannot be used"),
]


@pytest.mark.parametrize(
    ("settings", "message"), BAD_SETTINGS, ids=[str(settings) for settings, _ in BAD_SETTINGS]
)
def test_a_bad_dtype_or_device(settings: dict[str, Any], message: str, folder: Path) -> None:
    # Refused before any weight is read.
    (folder / "model.safetensors").unlink()
    refused(InvalidInputError, message, call=lambda: load(folder, **settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_available(folder: Path) -> None:
    for device in ("cuda", "cuda:7"):
        message = f"device '{device}' is not available: torch sees no CUDA device; use cpu, or auto"
        refused(InvalidInputError, message, call=lambda d=device: load(folder, device=d))
    assert load(folder, device="auto").device.type == "cpu"
