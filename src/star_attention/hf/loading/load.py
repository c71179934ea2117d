"""Load a model and its tokenizer from a folder or a hub id, with errors that say what is missing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from star_attention.config import check_device
from star_attention.config import check_dtype as check_dtype
from star_attention.errors import (
    InvalidInputError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
    first_line,
)
from star_attention.hf.loading import support

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def pick_device(device: str) -> str:
    """`"auto"` is the first accelerator, or the CPU.

    Raises `InvalidInputError` for a device that is not there.
    """
    check_device(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:  # its message lists every kind that there has been
        raise InvalidInputError(
            f"device {device!r} is unknown; use auto, cpu, cuda or cuda:1"
        ) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            f"device {device!r} was asked for, but torch sees no CUDA device; use cpu, or auto"
        )
    if kind == "meta":
        raise InvalidInputError(f"device {device!r} holds no numbers; use auto, cpu or cuda")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend has an error of its own for not being there
        raise InvalidInputError(
            f"device {device!r} cannot be used ({first_line(error)}); use auto, cpu or cuda"
        ) from None
    return device


def own_device(device: str) -> str:
    """What `"auto"` and `"cuda"` mean for one of several processes on a machine: each its own GPU, as torchrun numbers them."""
    gpus = torch.cuda.device_count()
    if device in ("auto", "cuda") and gpus:
        return f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % gpus}"
    return device


_FOR_ALL_FILES = (
    "trust_remote_code",
    "revision",
    "code_revision",
    "token",
    "subfolder",
    "cache_dir",
    "local_files_only",
)


def for_all_files(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those words of `from_pretrained` that say where a model's files are."""
    return {word: value for word, value in model_kwargs.items() if word in _FOR_ALL_FILES}


def load_config(path: str | os.PathLike[str], **where: Any) -> Any:
    """The config of a model folder or hub id; `where` goes to transformers (revision, subfolder, ...).

    Raises `ModelNotFoundError` where there is none.
    """
    _check_path(path, str(where.get("subfolder") or ""))
    try:
        return AutoConfig.from_pretrained(path, **where)
    except Exception as error:  # configs check their values in ways of their own
        what = f"no model could be read at {path}"
        if not Path(path).exists():
            what = f"there is no folder {path} here, and it could not be had as a hub id"
        raise ModelNotFoundError(f"{what}: {first_line(error)}") from error


def load(
    path: str | os.PathLike[str], *, dtype: str, device: str, model_kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer (None where the folder has none).

    Raises `ModelNotFoundError`, `UnsupportedModelError` (before weights are read) or `InvalidInputError`.
    """
    name = check_dtype(dtype)
    where = for_all_files(model_kwargs)
    config = load_config(path, **where)
    reasons = support.reasons(config)
    if reasons:
        raise UnsupportedModelError(f"{config.model_type} ({path})", reasons)
    options = {"dtype": name if name == "auto" else getattr(torch, name), **model_kwargs}
    if "device_map" not in options:
        device = pick_device(device)
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
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
        raise ModelNotFoundError(
            f"the model at {path} is incomplete: its files lack {missing[0]}{more}; copy or download it again"
        )
    if "device_map" not in options:
        model = model.to(device)
    return model.eval(), load_tokenizer(path, **where)


def load_tokenizer(path: str | os.PathLike[str], **where: Any) -> Any:
    """The tokenizer of a model folder, or None where the folder has none (token ids need none)."""
    folder = Path(path) / str(where.get("subfolder") or "")
    if (
        folder.is_dir()
        and not any(folder.glob("tokenizer*"))
        and not any(folder.glob("*.model"))
        and not any(folder.glob("vocab*"))
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, **where)
    except Exception as error:  # the tokenizer libraries raise bare Exceptions for a broken file
        raise ModelNotFoundError(
            f"the tokenizer at {path} could not be read: {first_line(error)}"
        ) from error


def _check_path(path: str | os.PathLike[str], subfolder: str = "") -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise ModelNotFoundError(f"{path!r} is no model; give the path of its folder, or a hub id")
    folder = Path(path)
    try:
        is_folder, exists, has_config = (
            folder.is_dir(),
            folder.exists(),
            (folder / subfolder / "config.json").is_file(),
        )
    except OSError as error:  # no permission, or a name that the file system cannot have
        raise ModelNotFoundError(f"the model folder cannot be read: {error}") from error
    if is_folder:
        if not has_config:
            raise ModelNotFoundError(
                f"the folder {folder} holds no config.json: it is not a transformers model folder"
            )
        return
    if exists:
        raise ModelNotFoundError(f"{folder} is a file; give the model's folder, or a hub id")
    # `models/needle` reads like a hub id; where the folder `models` stands here, a path was meant.
    is_path = (
        folder.is_absolute()
        or str(path).startswith(".")
        or (len(folder.parts) > 1 and folder.parent.is_dir())
    )
    if is_path or not _HUB_ID.fullmatch(str(path)):
        raise ModelNotFoundError(
            f"there is no model folder {path}; check the path, or give a hub id like organisation/name"
        )
