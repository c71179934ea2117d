"""What can be checked of a model's files before torch is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from star_attention.errors import (
    InvalidInputError,
    ModelNotFoundError,
    UnsupportedModelError,
    first_line,
    quote,
)
from star_attention.hf.loading import family_source, weight_formats
from star_attention.hf.loading.config_file import check_is_no_pointer, read_json
from star_attention.hf.loading.files import (
    ADAPTER_CONFIG,
    INDEXES,
    OTHER_WEIGHTS,
    WEIGHTS,
    ModelFiles,
)
from star_attention.hf.loading.packages import (
    need_packages,
    need_quantization_packages,
    quantization,
)

_CAUSAL_LM = "CAUSAL_LM"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
_ENDS = 64
"""Bytes at a file's start and end that show whether it is whole."""
_NO_GENERATOR = re.compile(
    "(ForSequenceClassification|ForTokenClassification|ForQuestionAnswering|ForMaskedLM"
    "|ForMultipleChoice|RewardModel)$"
)
"""Classes of models that were not trained to continue a text."""


def check_loadable(model: ModelFiles) -> None:
    """Check that nothing in a model's files keeps it from being loaded.

    Raises:
        UnsupportedModelError: its files say that Star Attention cannot run it.
        MissingPackageError: a package that loads its weights or its adapter is not installed.
    """
    check_config(model)
    need_quantization_packages(model.path, model.config or {})
    if model.adapter is not None:
        need_packages(["peft"], f"{model.adapter} is an adapter")
        reasons = adapter_reasons(model)
        if reasons:
            raise UnsupportedModelError(f"the adapter at {model.adapter}", reasons)


def check_config(model: ModelFiles) -> None:
    """Check what a model's config.json shows by itself.

    Raises:
        UnsupportedModelError: Star Attention cannot run it.
    """
    reasons = config_reasons(model)
    if reasons:
        config = model.config or {}
        raise UnsupportedModelError(f"{config.get('model_type')} ({model.path})", reasons)


def config_reasons(model: ModelFiles) -> list[str]:
    """Return the reasons why a model cannot run that its config.json shows by itself."""
    config = model.config or {}
    if model.location.get("trust_remote_code"):
        return []
    classes = config.get("architectures")
    names = classes if isinstance(classes, list) else []
    if names and all(_NO_GENERATOR.search(str(name)) for name in names):
        return [f"it is a {names[0]}, which was not trained to generate text"]
    return family_source.reasons(config)


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


def check_tokenizer(model: ModelFiles) -> None:
    """Check that the file of a tokenizer that lies here is whole.

    Raises:
        ModelNotFoundError: it is not JSON.
    """
    folder = model.tokenizer_folder
    file = folder / "tokenizer.json" if folder is not None else None
    # Other files may hold the tokenizer, too.
    if folder is None or file is None or not file.is_file() or any(folder.glob("*.model")):
        return
    with open(file, "rb") as reader:
        start = reader.read(_ENDS).lstrip()
        reader.seek(max(0, file.stat().st_size - _ENDS))
        is_whole = start.startswith(b"{") and reader.read().rstrip().endswith(b"}")
    if is_whole:
        # Reading all of it would take longer than what it could save.
        return
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable_tokenizer(model.tokenizer_source, error) from error


def unreadable_tokenizer(source: Any, error: Exception) -> ModelNotFoundError:
    """Return the error for a tokenizer that its library refuses."""
    return ModelNotFoundError(
        f"the tokenizer at {source} could not be read: {first_line(error).rstrip(':. ')}; copy its"
        " files there again"
    )


def lacks_chat_template(model: ModelFiles) -> bool:
    """Return True if a model's tokenizer lies here, and brings no chat template."""
    folder = model.tokenizer_folder
    return folder is not None and not (
        any((folder / name).exists() for name in _TEMPLATE_FILES)
        or read_json(folder / "tokenizer_config.json").get("chat_template")
    )


def check_weights(model: ModelFiles, model_kwargs: dict[str, Any]) -> None:
    """Check that the weights of a model that lies here are complete, and of a readable format.

    Args:
        model: the model.
        model_kwargs: arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelNotFoundError: there are none, a shard is missing, or their format is another.
    """
    folder = model.folder
    if folder is None or model.gguf_file is not None or "variant" in model_kwargs:
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
    if "quantization_config" not in model_kwargs:
        weight_formats.check(folder, name, model.config or {})


def check_can_quantize(
    model: ModelFiles, model_kwargs: dict[str, Any], weights: str | None
) -> None:
    """Check that the linear layers of a model can be loaded in another precision.

    Args:
        model: the model.
        model_kwargs: arguments of `AutoModelForCausalLM.from_pretrained`.
        weights: the precision, of `weight_formats.WEIGHTS`; None for the files' own.

    Raises:
        InvalidInputError: an unknown precision, or weights that are quantized already.
        UnsupportedModelError: an adapter that reads the layers' weights.
    """
    weight_formats.check_name(weights)
    if weights is None:
        return
    if "quantization_config" in model_kwargs:
        raise InvalidInputError(
            f"weights={quote(weights)} does not work with quantization_config in model_kwargs;"
            " leave one of them out"
        )
    method = None if model.gguf_file is not None else quantization(model.config or {})
    if method is not None:
        raise quantized_already(model, method, weights)
    if model.adapter is not None:
        settings = read_json(Path(model.adapter) / ADAPTER_CONFIG)
        kind = settings.get("peft_type")
        if kind not in (None, "LORA") or settings.get("use_dora"):
            raise UnsupportedModelError(
                f"the adapter at {model.adapter} with weights={quote(weights)}",
                [
                    f"{'DoRA' if kind == 'LORA' else kind} reads the weights of the layers; merge"
                    " the adapter into the model, or load without weights"
                ],
            )


def quantized_already(model: ModelFiles, method: str, weights: str) -> InvalidInputError:
    """Return the error for weights that were quantized by a method, and are to be once more."""
    return InvalidInputError(
        f"the weights at {model.path} are quantized already ({method}), and"
        f" weights={quote(weights)} needs plain ones; leave it out, or give the original model or a"
        " GGUF file of it"
    )


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
