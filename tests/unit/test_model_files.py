"""What people name as a model: incomplete folders, subfolders, hub ids, own code, quantization."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from star_attention import StarLLM, supported
from star_attention.errors import (
    InvalidInputError,
    MissingPackageError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from star_attention.hf.loading import checks, files, hub
from tests.engines import BUNDLED, bundled_tokenizer, ids, tiny
from tests.families import build
from tests.model_folders import complete_model, edit
from tests.refusals import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return complete_model(tmp_path / "model")


def load(path: Any, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(path, **settings)


# ------------------------------------------------------------------------------------------ weights


def test_weights_in_bin_files_load(folder: Path) -> None:
    expected = load(folder).encode(ids(50)).kv.layers[0].stored()[0]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(load(folder).encode(ids(50)).kv.layers[0].stored()[0], expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.safetensors", "only weights in the layout of their authors; convert it"),
        ("tf_model.h5", "only TensorFlow weights; convert it"),
        ("model.onnx", "only an ONNX model; convert it"),
        ("model-00001-of-00002.safetensors", "the list of its shards, model.safetensors.index"),
    ],
)
def test_weights_that_transformers_cannot_load(name: str, message: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(ModelNotFoundError, "no weights", message, call=lambda: load(folder))


def test_a_missing_shard_is_found_before_anything_is_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny("llama").save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards[1:]:
        shard.unlink()
    message = f"{shards[1].name} and {len(shards) - 2} more of {len(shards)} files is missing"
    refused(
        ModelNotFoundError,
        message,
        call=lambda: checks.check_weights(files.locate(folder), {}),
    )
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(ModelNotFoundError, "lists no weights", call=lambda: load(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs(name: str, folder: Path) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    message = f"{folder / name} is a pointer of git LFS, not the file itself; run `git lfs pull`"
    refused(ModelNotFoundError, message, call=lambda: load(folder))


def test_a_broken_tokenizer_is_found_before_the_weights(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    (folder / "model.safetensors").write_text("never read")
    refused(ModelNotFoundError, "the tokenizer at", call=lambda: load(folder))


# ------------------------------------------------------------------------------------------ folders


def test_a_subfolder(folder: Path) -> None:
    outer = folder.parent
    message = f"give {folder}, or --subfolder model (in Python: subfolder='model')"
    refused(ModelNotFoundError, message, call=lambda: load(outer))
    star = load(outer, subfolder="model")
    assert star.tokenizer is not None
    assert len(star.encode(ids(50))) == 50
    # A tokenizer of the whole repository, and none in the subfolder.
    for file in folder.glob("tokenizer*"):
        file.rename(outer / file.name)
    star = load(outer, subfolder="model")
    assert star.tokenizer("the cat").input_ids == bundled_tokenizer()("the cat").input_ids
    # Its template is found, too.
    assert not checks.lacks_chat_template(files.locate(outer, {"subfolder": "model"}))
    message = f"the folder {outer} has no subfolder modell; check its name"
    refused(ModelNotFoundError, message, call=lambda: load(outer, subfolder="modell"))


def test_folders_of_another_kind(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree(folder, cache / "snapshots" / "0123")
    message = f"it is a folder of the hub's cache; give {cache / 'snapshots' / '0123'}"
    refused(ModelNotFoundError, message, call=lambda: load(cache))
    images = tmp_path / "images"
    images.mkdir()
    (images / "model_index.json").write_text("{}")
    refused(ModelNotFoundError, "it is a pipeline for images", call=lambda: load(images))
    original = tmp_path / "original"
    original.mkdir()
    (original / "consolidated.00.pth").write_text("")
    refused(ModelNotFoundError, "weights in the layout", call=lambda: load(original))


def test_an_encoder_decoder_is_refused_by_its_config_alone(bare_config: Path) -> None:
    edit(bare_config, is_encoder_decoder=True, model_type="t5")
    refused(UnsupportedModelError, "it is an encoder-decoder", call=lambda: load(bare_config))


# ----------------------------------------------------------------------------------------- hub ids


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids half a minute of retries without a network."""
    calls: list[str] = []

    def unreachable(url: str, **_: Any) -> None:
        calls.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    start = time.monotonic()
    message = (
        "there is no folder nobody/nothing here, and it could not be loaded as a hub id: the hub is"
        " out of reach (Name or service not known); check the path or the id"
    )
    refused(ModelNotFoundError, message, call=lambda: load("nobody/nothing"))
    assert time.monotonic() - start < 2
    assert len(calls) == 1
    assert calls[0].endswith("/nobody/nothing/resolve/main/config.json")


def test_a_cached_model_is_used_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(BUNDLED, snapshot)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    assert hub.check("a/b", "config.json", {"cache_dir": tmp_path}) == snapshot
    kwargs = {"cache_dir": str(tmp_path)}
    start = time.monotonic()
    assert load("a/b", model_kwargs=kwargs).tokenizer is not None
    assert time.monotonic() - start < 5
    (snapshot / "model.safetensors.index.json").unlink()
    refused(ModelNotFoundError, "no weights", call=lambda: load("a/b", model_kwargs=kwargs))


def test_a_switched_off_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "it is not in the hub's cache, and the hub is switched off (HF_HUB_OFFLINE)"
    refused(ModelNotFoundError, message, call=lambda: load("nobody/nothing"))
    refused(ModelNotFoundError, "check the path or the id", call=lambda: load("nobody/a--b"))


# ---------------------------------------------------------------------- attention, code, precision


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/nothing"])
def test_an_attention_that_is_not_installed(field: str, name: str, folder: Path) -> None:
    """The checkpoint's choice must not keep it from loading: ours takes its place."""
    expected = load(folder).encode(ids(50)).kv.layers[1].stored()[0]
    star = load(edit(folder, **{field: name}), model_kwargs={"max_position_embeddings": 999})
    assert star.model.config.max_position_embeddings == 999
    assert star.model.config._attn_implementation == "sdpa"
    assert torch.equal(star.encode(ids(50)).kv.layers[1].stored()[0], expected)
    if not torch.cuda.is_available():
        kwargs = {"attn_implementation": "flash_attention_2"}
        with pytest.raises(MissingPackageError, match="not installed: FlashAttention2"):
            load(folder, model_kwargs=kwargs)


def test_an_attention_that_is_not_installed_in_a_text_config(tmp_path: Path) -> None:
    build("gemma3_vlm").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(load(tmp_path).encode(ids(50))) == 50


OWN_CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids transformers' question on the terminal, which waits 15 seconds."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    cache = folder.parent / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    (folder / "configuration_own.py").write_text(OWN_CONFIG)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    expected = load(folder).encode(ids(50)).kv.layers[1].stored()[0]
    edit(folder, model_type="own", auto_map=auto_map)
    message = (
        f"the model at {folder} runs with code of its own (configuration_own.py, modeling_own.py),"
        " which is not run unless you allow it; read that code first, then give"
        " --trust-remote-code (in Python: trust_remote_code=True)"
    )
    refused(ModelNotFoundError, message, call=lambda: load(folder))
    refused(ModelNotFoundError, message, call=lambda: supported(folder))
    star = load(folder, trust_remote_code=True)
    assert type(star.model).__name__ == "OwnForCausalLM"
    assert torch.equal(star.encode(ids(50)).kv.layers[1].stored()[0], expected)


@pytest.mark.parametrize(
    ("method", "module", "install"),
    [
        ("bitsandbytes", "bitsandbytes", "pip install bitsandbytes"),
        ("gptq", "gptqmodel", "gptqmodel"),
        ("awq", "gptqmodel", "pip install gptqmodel"),
        ("compressed-tensors", "compressed_tensors", "pip install compressed-tensors"),
        ("torchao", "torchao", 'pip install "star-attention[torchao]"'),
    ],
)
def test_the_package_for_quantized_weights_is_named(
    method: str, module: str, install: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "star_attention.hf.loading.packages.find_spec",
        lambda name: None if name == module else object(),
    )
    edit(folder, quantization_config={"quant_method": method})
    message = f"the weights at {folder} are quantized with {method}, which needs the package"
    with pytest.raises(MissingPackageError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert str(caught.value).endswith(install)
    # The config alone can be read.
    assert supported(folder)


def test_weights_that_are_unpacked_at_the_first_forward() -> None:
    """As those of compressed-tensors are, by a hook of the whole model."""
    expected = StarLLM(tiny("llama")).logits(StarLLM(tiny("llama")).encode(ids(50)), ids(3))
    model = build("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    packed = weight.detach().clone()
    weight.data.zero_()
    model.hf_quantizer = object()

    def unpack(*_: object) -> None:
        weight.data.copy_(packed)
        hook.remove()

    hook = model.register_forward_pre_hook(unpack)
    star = StarLLM(model)
    assert torch.equal(star.logits(star.encode(ids(50)), ids(3)), expected)


def test_arguments_that_transformers_does_not_know(folder: Path) -> None:
    """Forbids a foreign TypeError."""
    message = [f"the model at {folder} could not be loaded", "'nonsense'"]
    refused(ModelNotFoundError, *message, call=lambda: load(folder, model_kwargs={"nonsense": 1}))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_autocast(family: str) -> None:
    """Inside torch.autocast a model answers as outside, or is refused with the remedy."""
    exact = StarLLM(tiny(family), block_size=16)
    context = exact.encode(ids(50))
    half = StarLLM(build(family).to(torch.bfloat16), block_size=16)
    expected = half.logits(half.encode(ids(50)), ids(3))
    message = (
        "torch.autocast to bfloat16 is on, but the model is in float32: call this library outside"
        " of autocast, or load the model in bfloat16 (dtype='bfloat16')"
    )
    with torch.autocast("cpu", torch.bfloat16):
        refused(InvalidInputError, message, call=lambda: exact.encode(ids(50)))
        refused(InvalidInputError, message, call=lambda: exact.generate(context, ids(3)))
        assert torch.equal(half.logits(half.encode(ids(50)), ids(3)), expected)
    assert len(exact.generate(context, ids(3), max_new_tokens=2).token_ids) > 0
