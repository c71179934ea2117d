"""What can be checked of a model's files before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from star_attention.errors import ModelNotFoundError, UnsupportedModelError
from star_attention.hf.loading.files import (
    ADAPTER_CONFIG,
    INDEXES,
    OTHER_WEIGHTS,
    WEIGHTS,
    ModelFiles,
    check_is_no_pointer,
    read_json,
)
from star_attention.hf.loading.packages import need_packages, need_quantization_packages

_CAUSAL_LM = "CAUSAL_LM"
_VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
ENCODER_DECODER = "it is an encoder-decoder model; Star Attention runs decoder-only models"


def check_loadable(model: ModelFiles) -> None:
    """Check that nothing in a model's files keeps it from being loaded.

    Raises:
        UnsupportedModelError: its files say that Star Attention cannot run it.
        MissingPackageError: a package that loads its weights or its adapter is not installed.
    """
    config = model.config or {}
    if config.get("is_encoder_decoder") is True:
        raise UnsupportedModelError(f"{config.get('model_type')} ({model.path})", [ENCODER_DECODER])
    need_quantization_packages(model.path, config)
    if model.adapter is not None:
        need_packages(["peft"], f"{model.adapter} is an adapter")
        reasons = adapter_reasons(model)
        if reasons:
            raise UnsupportedModelError(f"the adapter at {model.adapter}", reasons)


def adapter_reasons(model: ModelFiles) -> list[str]:
    """Return the reasons why a model's adapter, if it is here, cannot run; empty if it can."""
    if model.adapter is None:
        return []
    settings = read_json(Path(model.adapter) / ADAPTER_CONFIG)
    kind, task = settings.get("peft_type"), settings.get("task_type")
    reasons = []
    if str(kind) in _VIRTUAL_TOKENS:
        reasons.append(virtual_tokens(kind))
    if task not in (None, _CAUSAL_LM):
        reasons.append(f"it was trained for {task}, not to generate text ({_CAUSAL_LM})")
    return reasons


def virtual_tokens(kind: Any) -> str:
    """Return the reason against adapters of a kind that prepends tokens."""
    return (
        f"{kind} adapters put virtual tokens before every forward; adapters inside the layers"
        " (LoRA) work"
    )


def check_weights(model: ModelFiles) -> None:
    """Check that the weights of a model that lies here are complete.

    Raises:
        ModelNotFoundError: there are none, or a shard is missing.
    """
    folder = model.folder
    if folder is None or model.gguf_file is not None:
        return
    if (model.config or {}).get("transformers_weights"):
        # The config names a file of its own.
        return
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise ModelNotFoundError(_without_weights(folder))
    names = _shards(folder / name) if name in INDEXES else [name]
    missing = [shard for shard in names if not (folder / shard).is_file()]
    if missing:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more of {len(names)} files"
        raise ModelNotFoundError(
            f"the model at {folder} is incomplete: {missing[0]}{more} is missing; copy or download"
            " it again"
        )
    for shard in names:
        check_is_no_pointer(folder / shard)


def _without_weights(folder: Path) -> str:
    """Return the error for a folder without weights."""
    problem = f"the folder {folder} holds a config.json, but no weights (model.safetensors)"
    if any(folder.glob("model-*-of-*.safetensors")):
        return f"{problem}: the list of its shards, {INDEXES[0]}, is missing; copy it there"
    for pattern, kind in OTHER_WEIGHTS.items():
        if any(folder.glob(pattern)):
            return f"{problem}, only {kind}; convert it, or download the version for transformers"
    return f"{problem}; copy or download them, too"


def _shards(index: Path) -> list[str]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ModelNotFoundError(f"{index} lists no weights; copy or download it again")
    return sorted({str(name) for name in weights.values()})
