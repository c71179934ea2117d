"""Load a model or its tokenizer from a folder, a GGUF file or a hub id.

What is missing is refused by `files.py`; whatever is unreadable, by a `ModelNotFoundError` raised
here.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_attention.config import check_device, check_dtype
from star_attention.errors import (
    InvalidInputError,
    MissingPackageError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
    first_line,
    quote,
)
from star_attention.hf.loading import (
    adapters,
    checks,
    files,
    fp8,
    rope_scaling,
    rope_words,
    support,
)
from star_attention.hf.loading.files import ModelFiles
from star_attention.hf.loading.gguf_tokenizer import with_special_tokens
from star_attention.hf.loading.model_config import (
    config_of,
    location_kwargs,
    refuse_remote_code,
    without_remote_code,
)
from star_attention.hf.loading.tokenizer_files import as_filed

_ATTENTION = "_attn_implementation"
_ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_3"}
_PLAIN_ATTENTION = (None, "eager", "sdpa", "flex_attention")


# ------------------------------------------------------------------------------------------ devices


def pick_device(device: str) -> str:
    """Resolve `"auto"` to the first accelerator or the CPU, and check any other device.

    Raises:
        InvalidInputError: an unknown device, or one that is not available.
    """
    check_device(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        # torch's own message lists every kind of device that ever existed.
        raise InvalidInputError(
            f"device {quote(device)} is unknown; use auto, cpu, cuda or cuda:1"
        ) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            f"device {quote(device)} is not available: torch sees no CUDA device; use cpu, or auto"
        )
    if kind == "meta":
        raise InvalidInputError(f"device {quote(device)} stores no values; use auto, cpu or cuda")
    try:
        torch.empty(0, device=device)
    except Exception as error:
        # Each backend has an error of its own for a missing device.
        raise InvalidInputError(
            f"device {quote(device)} cannot be used ({first_line(error)}); use auto, cpu or cuda"
        ) from None
    return device


def device_of_rank(device: str) -> str:
    """Resolve `"auto"` and `"cuda"` for one of several processes: each takes its own GPU.

    torchrun's `LOCAL_RANK` is the index of the GPU.
    """
    gpus = torch.cuda.device_count()
    if device in ("auto", "cuda") and gpus:
        return f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % gpus}"
    return device


# -------------------------------------------------------------------------------------------- files


def reasons(path: str | os.PathLike[str], **location: Any) -> list[str]:
    """Return the reasons why the model at a path cannot run; empty if it can.

    Args, Raises: as for `model_config.load_config`.
    """
    model = files.locate(path, location)
    against = checks.config_reasons(model) or support.reasons(config_of(model))
    return [*against, *checks.adapter_reasons(model)]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str,
    device: str,
    model_kwargs: dict[str, Any],
    adapter: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    quantize_on: str | None = None,
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        path: model folder, GGUF file, adapter's folder or hub id.
        dtype: one of `config.DTYPES`.
        device: "auto", or a torch device; ignored if `model_kwargs` has a `device_map`.
        model_kwargs: arguments of `AutoModelForCausalLM.from_pretrained`.
        adapter: folder or hub id of an adapter to load around the model.
        weights: precision of linear layers, of `weight_formats.WEIGHTS`; None for the files' own.
        quantize_on: where they are quantized, if not on the device that the model is moved to.

    Returns:
        The model, and the tokenizer, None if the folder has none.

    Raises:
        ModelNotFoundError: the model or its tokenizer is missing, incomplete or unreadable.
        UnsupportedModelError: Star Attention cannot run it; raised before weights are read.
        MissingPackageError: a package that its files need is not installed.
        InvalidInputError: an invalid dtype or device.
        OutOfMemoryError: the weights do not fit.
    """
    name = check_dtype(dtype)
    rotary, model_kwargs = rope_words.take(model_kwargs)
    model_files = files.locate(path, location_kwargs(model_kwargs), adapter)
    checks.check_loadable(model_files)
    config = config_of(model_files, rotary)
    against = support.reasons(config)
    if against:
        raise UnsupportedModelError(f"{config.model_type} ({model_files.path})", against)
    if "device_map" not in model_kwargs:
        device = pick_device(device)
    checks.check_weights(model_files, model_kwargs)
    checks.check_can_quantize(model_files, model_kwargs, weights)
    _check_quantization(config, model_files, weights)
    # Before the weights: it is quick, and may be broken.
    tokenizer = _load_tokenizer(model_files)
    options = {"dtype": name if name == "auto" else getattr(torch, name)}
    options |= {name: value for name, value in model_kwargs.items() if name not in files.LOCATION}
    options |= without_remote_code(model_files)
    is_replaced = _replace_attention(config)
    if is_replaced or rotary or rope_scaling.may_be_renamed(config):
        # The file says otherwise.
        options = _with_config(config, options)
    model = _load_weights(model_files, options)
    # An adapter puts layers of its own around them.
    linears = None if weights is None else list(fp8.layers(model))
    plain = model
    if model_files.adapter is not None:
        model = adapters.attach(model, model_files.adapter, tokenizer)
    place = None if "device_map" in model_kwargs else device
    if linears is not None:
        _quantize(plain, linears, quantize_on or place, back_to=quantize_on and place)
    return (model if place is None else model.to(place)).eval(), tokenizer


def _quantize(model: Any, linears: list[Any], device: str | None, *, back_to: str | None) -> None:
    try:
        fp8.quantize(model, linears, device, back_to=back_to)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"out of memory while quantizing weights on {device}: use a larger device, or"
            " tensor_parallel to share the weights over several"
        ) from error


def _check_quantization(config: Any, model_files: ModelFiles, weights: str | None) -> None:
    """Refuse weights quantized by a method that transformers does not know, but would load.

    So are those of the hub that are to be quantized once more: their config is known by now.
    """
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None:
        return
    if weights is not None and model_files.gguf_file is None:
        raise checks.quantized_already(model_files, method, weights)
    # Imports the packages of every quantizer.
    from transformers.quantizers import AutoHfQuantizer

    if not AutoHfQuantizer.supports_quant_method(settings):
        raise ModelNotFoundError(
            f"the weights at {model_files.path} are quantized with {method}, which this version of"
            " transformers does not know; update transformers, or give the original model or a GGUF"
            " file of it"
        )


def _replace_attention(config: Any) -> bool:
    """Replace a config's attention implementation where it cannot run here; True if replaced.

    Ours takes its place in every forward of ours, so a checkpoint's choice must not keep it from
    loading.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    if all(_can_attend(getattr(part, _ATTENTION, None)) for part in parts):
        return False
    setattr(config, _ATTENTION, "sdpa" if support.class_of(config)._supports_sdpa else "eager")
    return True


def _with_config(config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that load a model with a config of ours.

    transformers sets those that are fields of a config on its own config only.
    """
    fields = options.keys() - {"dtype", "quantization_config", "attn_implementation"}
    fields = {name for name in fields if hasattr(config, name)}
    for name in fields:
        setattr(config, name, options[name])
    others = {name: value for name, value in options.items() if name not in fields}
    return others | {"config": config}


def _can_attend(name: Any) -> bool:
    """True if an attention implementation of transformers is installed."""
    if name in _PLAIN_ATTENTION:
        return True
    package = _ATTENTION_PACKAGES.get(str(name))
    return package is not None and find_spec(package) is not None and torch.cuda.is_available()


def _load_weights(model_files: ModelFiles, options: dict[str, Any]) -> Any:
    path: Any = model_files.gguf_file or model_files.path
    # Weights of another shape are in the report then; otherwise only in a table that is logged.
    options = options | {"ignore_mismatched_sizes": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            model_files.path, output_loading_info=True, **options
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"out of memory while loading {path}: choose a smaller dtype, quantized weights, or"
            ' model_kwargs={"device_map": "auto"} to spread the layers'
        ) from error
    except ImportError as error:
        raise MissingPackageError(
            f"the model at {path} needs a package that is not installed:"
            f" {first_line(error).rstrip('.')}; install it, or leave out the argument that asks for"
            " it"
        ) from error
    except Exception as error:
        # Readers of weights and quantizers have errors of any type.
        refuse_remote_code(model_files, error)
        remedy = "; copy or download it again" if isinstance(error, SafetensorError) else ""
        raise ModelNotFoundError(
            f"the model at {path} could not be loaded: {first_line(error)}{remedy}"
        ) from error
    _check_report(path, model, report)
    settings: Any = getattr(model.config, "quantization_config", None)
    if getattr(settings, "gguf_file", None) is not None:
        # A context's identity includes the config, and must not depend on the name of a file.
        settings.gguf_file = None
    return model


def _check_report(path: Any, model: Any, report: dict[str, Any]) -> None:
    """Refuse a model that lacks weights: transformers fills them with random values.

    Args:
        path: what to call the model.
        model: the model, as loaded.
        report: what transformers reports of its weights.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
        raise ModelNotFoundError(
            f"the model at {path} is incomplete: its files lack {missing[0]}{more}; copy or"
            f" download it again{_without_output(missing, model)}"
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, in_files, expected = mismatched[0]
        more = "" if len(mismatched) == 1 else f" ({len(mismatched)} weights differ)"
        raise ModelNotFoundError(
            f"the model at {path} does not fit its config.json: {name} has the shape"
            f" {tuple(in_files)}, expected {tuple(expected)}{more}; check that both are of the same"
            " model, or download them again"
        )


def _without_output(missing: list[str], model: Any) -> str:
    """Say what a model without its output layer alone may be."""
    embeddings = model.get_output_embeddings()
    weights = [name for name, part in model.named_parameters() if part is embeddings.weight]
    classes = getattr(model.config, "architectures", None) or ["an embedding model"]
    return f" (it may be {classes[0]}, which generates no text)" if missing == weights else ""


def load_tokenizer(path: str | os.PathLike[str], **location: Any) -> Any:
    """Load the tokenizer of a model.

    Args:
        path: model folder, GGUF file or hub id.
        location: arguments of `AutoTokenizer.from_pretrained` (revision, subfolder, ...).

    Returns:
        The tokenizer, None if the folder has none (token ids need none).

    Raises:
        ModelNotFoundError: it cannot be read.
    """
    return _load_tokenizer(files.locate(path, location))


def _load_tokenizer(model: ModelFiles) -> Any:
    source = model.tokenizer_source
    if source is None:
        return None
    location = without_remote_code(model)
    if source != model.path:
        # An adapter's own, to which the model's revision and subfolder do not apply.
        location = {"trust_remote_code": location["trust_remote_code"]}
    if model.has_tokenizer_beside_gguf:
        location.pop("gguf_file")
    elif model.has_tokenizer_above:
        location.pop("subfolder", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **location)
        if model.gguf_file is not None and "gguf_file" in location:
            tokenizer = with_special_tokens(tokenizer, model.gguf_file)
    except Exception as error:
        # The tokenizer libraries raise bare Exceptions for a broken file.
        refuse_remote_code(model, error)
        raise checks.unreadable_tokenizer(model.gguf_file or source, error) from error
    return as_filed(tokenizer, source, location)
