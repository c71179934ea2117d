"""Load a model, its config or its tokenizer from a folder or a hub id.

Whatever is missing or unreadable is a `ModelNotFoundError` raised here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from star_attention.config import check_device, check_dtype
from star_attention.errors import (
    InvalidInputError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
    first_line,
    quote,
    quote_path,
)
from star_attention.hf.loading import rope_scaling, support

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_LOCATION_KWARGS = (
    "trust_remote_code",
    "revision",
    "code_revision",
    "token",
    "subfolder",
    "cache_dir",
    "local_files_only",
)


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


def location_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a model's files are."""
    return {name: value for name, value in model_kwargs.items() if name in _LOCATION_KWARGS}


def load_config(
    path: str | os.PathLike[str], rotary: dict[str, Any] | None = None, **location: Any
) -> Any:
    """Load the config of a model.

    Args:
        path: model folder or hub id.
        rotary: settings that replace the config's rotary scaling (`rope_scaling.take`).
        location: arguments of `AutoConfig.from_pretrained` (revision, subfolder, ...).

    Raises:
        ModelNotFoundError: there is no model, or its config cannot be read.
        InvalidInputError: rotary settings that cannot work.
    """
    _check_model_path(path, str(location.get("subfolder") or ""))
    try:
        config = rope_scaling.config_with_new_names(path, location) or AutoConfig.from_pretrained(
            path, **location
        )
    except Exception as error:
        # Configs check their values with errors of any type.
        problem = f"no model could be read at {path}"
        remedy = "check the path, or copy or download the model again"
        if not Path(path).exists():
            problem = f"there is no folder {path} here, and it could not be loaded as a hub id"
            remedy = "check the path or the id, and for a hub id the network and your access to it"
        raise ModelNotFoundError(f"{problem}: {first_line(error).rstrip('.')}; {remedy}") from error
    if rotary:
        rope_scaling.apply(config, rotary)
    return config


def load(
    path: str | os.PathLike[str], *, dtype: str, device: str, model_kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        path: model folder or hub id.
        dtype: one of `config.DTYPES`.
        device: "auto", or a torch device; ignored if `model_kwargs` has a `device_map`.
        model_kwargs: arguments of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model, and the tokenizer, None if the folder has none.

    Raises:
        ModelNotFoundError: the model or its tokenizer is missing, incomplete or unreadable.
        UnsupportedModelError: Star Attention cannot run it; raised before weights are read.
        InvalidInputError: an invalid dtype or device.
        OutOfMemoryError: the weights do not fit.
    """
    name = check_dtype(dtype)
    location = location_kwargs(model_kwargs)
    rotary, model_kwargs = rope_scaling.take(model_kwargs)
    config = load_config(path, rotary, **location)
    reasons = support.reasons(config)
    if reasons:
        raise UnsupportedModelError(f"{config.model_type} ({path})", reasons)
    options = {"dtype": name if name == "auto" else getattr(torch, name), **model_kwargs}
    if rotary or rope_scaling.may_be_renamed(config):
        # The file says otherwise.
        options["config"] = config
    if "device_map" not in options:
        device = pick_device(device)
    model = _load_weights(path, options)
    if "device_map" not in options:
        model = model.to(device)
    return model.eval(), load_tokenizer(path, **location)


def _load_weights(path: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, **options
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"out of memory while loading {path}: choose a smaller dtype, quantized weights, or"
            ' model_kwargs={"device_map": "auto"} to spread the layers'
        ) from error
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        EOFError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise ModelNotFoundError(
            f"the model at {path} could not be loaded: {first_line(error)}"
        ) from error
    # transformers fills missing weights with random values and continues.
    missing = sorted(report["missing_keys"])
    if missing:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
        raise ModelNotFoundError(
            f"the model at {path} is incomplete: its files lack {missing[0]}{more}; copy or"
            " download it again"
        )
    return model


def load_tokenizer(path: str | os.PathLike[str], **location: Any) -> Any:
    """Load the tokenizer of a model.

    Args:
        path: model folder or hub id.
        location: arguments of `AutoTokenizer.from_pretrained` (revision, subfolder, ...).

    Returns:
        The tokenizer, None if the folder has none (token ids need none).

    Raises:
        ModelNotFoundError: it cannot be read.
    """
    folder = Path(path) / str(location.get("subfolder") or "")
    patterns = ("tokenizer*", "*.model", "vocab*")
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in patterns):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, **location)
    except Exception as error:
        # The tokenizer libraries raise bare Exceptions for a broken file.
        raise ModelNotFoundError(
            f"the tokenizer at {path} could not be read: {first_line(error)}"
        ) from error


def _check_model_path(path: str | os.PathLike[str], subfolder: str = "") -> None:
    """Raise `ModelNotFoundError` unless `path` is a model folder or may be a hub id."""
    if not isinstance(path, (str, os.PathLike)):
        raise ModelNotFoundError(
            f"{quote(path)} is not a model: expected the path of its folder or a hub id, got"
            f" {type(path).__name__}"
        )
    folder = Path(path)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
        has_config = (folder / subfolder / "config.json").is_file()
    except OSError as error:
        # No permission, or a name that the file system does not allow.
        raise ModelNotFoundError(
            f"the model folder {quote_path(path)} cannot be read ({error.strerror}); check the path"
        ) from error
    if is_folder:
        if not has_config:
            raise ModelNotFoundError(
                f"the folder {folder} holds no config.json: it is not a transformers model folder;"
                " give a folder that contains one, or a hub id"
            )
        return
    if exists:
        raise ModelNotFoundError(f"{folder} is a file; give the model's folder, or a hub id")
    # `models/needle` may be a hub id, but if there is a folder `models` here, a path was meant.
    is_path = (
        folder.is_absolute()
        or str(path).startswith(".")
        or (len(folder.parts) > 1 and folder.parent.is_dir())
    )
    if is_path or not _HUB_ID.fullmatch(str(path)):
        raise ModelNotFoundError(
            f"there is no model folder {quote_path(path)}; check the path, or give a hub id like"
            " organization/name"
        )
