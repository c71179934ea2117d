"""Models that are counted from their config.json alone, compared with the models themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.hf.loading import devices, plain_shape, positions, tensor_parallel
from star_attention.hf.shape import model_shape
from star_attention.planning.model_shape import ModelShape
from tests.engines import BUNDLED
from tests.families import FAMILIES
from tests.refusals import refused
from tests.unit.test_import import RUN_MODULE, in_new_process

COUNTED = (
    *("llama", "llama_mqa", "llama_mha", "llama_llama3scaling", "qwen2", "qwen3", "gemma"),
    *("granite", "mistral", "gemma2", "gemma3", "mixtral", "qwen3_moe"),
)


def saved(config: Any, folder: Path) -> dict[str, Any]:
    """Save a config; return the contents of its file."""
    config.save_pretrained(folder)
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return fields


def counted(fields: dict[str, Any], dtype: str = "auto") -> ModelShape | None:
    plain = plain_shape.read(fields, dtype)
    return None if plain is None else plain[0]


@pytest.mark.parametrize("family", COUNTED)
def test_counts_are_the_models(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    fields = saved(config, tmp_path)
    plain = plain_shape.read(fields, "auto")
    assert plain is not None
    shape, text_config = plain
    assert shape == model_shape(config)
    text = config.get_text_config(decoder=True)
    for read in (positions.max_positions, positions.doubt):
        assert read(text_config) == read(text)
    for ranks in (1, 3, 4):
        reasons = plain_shape.reasons_against_shards(fields, ranks)
        assert reasons == tensor_parallel.reasons(config, ranks)


def test_only_these_families_are_counted(tmp_path: Path) -> None:
    """Whatever is counted by its file is compared with its model, above."""
    names = {
        name
        for name, make in FAMILIES.items()
        if counted(saved(make(), tmp_path / name)) is not None
    }
    assert names == {*COUNTED}


CHANGED: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 1, "head_dim": 24},
    {"dtype": "float16"},
    {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": None},
    {"rope_parameters": {"type": "linear", "factor": 2}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
]


@pytest.mark.parametrize("fields", CHANGED, ids=str)
def test_fields_that_count(fields: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    changed = saved(FAMILIES["llama"](), tmp_path) | fields
    (tmp_path / "config.json").write_text(json.dumps(changed))
    config = AutoConfig.from_pretrained(tmp_path)
    plain = plain_shape.read(changed, "auto")
    assert plain is not None
    assert plain[0] == model_shape(config)
    assert counted(changed, "bfloat16") == model_shape(config, "bfloat16")
    for read in (positions.max_positions, positions.doubt):
        assert read(plain[1]) == read(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "of-tomorrow"},
        {"of_tomorrow": 1},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"num_hidden_layers": "3"},
        {"num_hidden_layers": True},
        {"hidden_size": 71},
        {"layer_types": ["sliding_attention"] * 3},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {}},
        {"dtype": "float8_e4m3fn"},
        {"eos_token_id": 1 << 20},
        {"hidden_act": "of-tomorrow"},
        {"rope_parameters": {"rope_type": "of-tomorrow"}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
        {"rope_parameters": {"rope_type": ["yarn"], "factor": 2}},
        {"rope_parameters": {"rope_type": "default", "of_tomorrow": 2}},
    ],
    ids=str,
)
def test_the_rest_is_left_to_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    config = saved(FAMILIES["llama"](), tmp_path)
    assert counted(config) is not None
    assert counted(config | fields) is None


@pytest.mark.parametrize("name", plain_shape.SIZES)
def test_a_field_that_is_missing_is_left_to_transformers(name: str, tmp_path: Path) -> None:
    config = saved(FAMILIES["mistral"](), tmp_path)
    del config[name]
    assert counted(config) is None


def test_a_dtype_is_refused_only_if_torch_cannot_have_it() -> None:
    import torch

    names = [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]
    assert len(names) > 20
    for name in ("auto", *names):
        plain_shape.check_dtype(name)
    refused(
        InvalidInputError,
        "dtype 'foo' is unknown; use auto, float32, bfloat16 or float16",
        call=lambda: plain_shape.check_dtype("foo"),
    )


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["plan"], 0),
        (["plan", "--ranks", "2", "--tensor-parallel", "2", "--json"], 0),
        (["estimate"], 0),
        (["plan", "--tensor-parallel", "5"], 1),
        (["plan", "--dtype", "foo"], 1),
        (["plan", "--second-look", "2"], 1),
        (["estimate", "--hardware", "foo"], 1),
    ],
    ids=str,
)
def test_plan_imports_neither_torch_nor_transformers(command: list[str], status: int) -> None:
    arguments = [*command, "-m", str(BUNDLED), "--context", "8k"]
    seen = in_new_process(RUN_MODULE.format(arguments=arguments))
    assert seen["status"] == status
    assert not seen["torch"]
    assert not seen["transformers"]


class Library:
    """Stands in for NVIDIA's management library, with a number of GPUs."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.gpus
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0


@pytest.mark.parametrize(
    ("build", "visible", "gpus", "device"),
    [
        ("2.13.0+cpu", None, 2, "cpu"),
        ("2.13.0", None, 2, "cuda"),
        ("2.13.0", "1,0", 2, "cuda"),
        ("2.13.0", "-1", 2, "cpu"),
        ("2.13.0", "", 2, "cpu"),
        # torch knows.
        ("2.13.0", "5", 2, "asked"),
        ("2.13.0", "GPU-1b2", 2, "asked"),
        ("2.13.0", None, 0, "asked"),
        ("2.13.0+rocm6.4", None, 0, "asked"),
    ],
)
def test_the_device_without_torch(
    build: str, visible: str | None, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from star_attention.hf.loading import load

    monkeypatch.setattr(load, "pick_device", lambda _: "asked")
    monkeypatch.setattr(devices, "version", lambda _: build)
    monkeypatch.setattr(devices, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: Library(gpus))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.default_device() == device


def test_without_a_driver_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "version", lambda _: "2.13.0")
    monkeypatch.setattr(devices, "has_cuda_driver", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.default_device() == "cpu"
