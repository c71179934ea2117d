"""Load a model's config, before anything heavier than it is imported.

What is missing is refused by `files.py`; whatever transformers refuses, by a `ModelNotFoundError`
raised here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from star_attention.errors import ModelNotFoundError, first_line
from star_attention.hf.loading import files, rope_scaling
from star_attention.hf.loading.files import ModelFiles


def location_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a model's files are."""
    return {name: value for name, value in model_kwargs.items() if name in files.LOCATION}


def load_config(
    path: str | os.PathLike[str], rotary: dict[str, Any] | None = None, **location: Any
) -> Any:
    """Load the config of a model; of an adapter's folder, that of its base model.

    Args:
        path: model folder, GGUF file or hub id.
        rotary: settings that replace the config's rotary scaling (`rope_words.take`).
        location: arguments of `AutoConfig.from_pretrained` (revision, subfolder, ...).

    Raises:
        ModelNotFoundError: there is no model, or its config cannot be read.
        InvalidInputError: rotary settings that cannot work.
    """
    return config_of(files.locate(path, location), rotary)


def config_of(model: ModelFiles, rotary: dict[str, Any] | None = None) -> Any:
    """Load the config of a model that has been located.

    Args, Raises: as for `load_config`.
    """
    try:
        location = without_remote_code(model)
        renamed = rope_scaling.config_with_new_names(model.path, location)
        config = renamed or AutoConfig.from_pretrained(model.path, **location)
    except Exception as error:
        # Configs check their values with errors of any type.
        refuse_remote_code(model, error)
        problem = f"no model could be read at {model.gguf_file or model.path}"
        if model.gguf_file is not None and _is_damaged(model.gguf_file):
            raise ModelNotFoundError(
                f"{problem}: the file is truncated or damaged; copy or download it again"
            ) from error
        remedy = "check the path, or copy or download the model again"
        if model.folder is None:
            problem = f"there is no folder {model.path} here, and it could not be loaded as a hub"
            problem += " id"
            remedy = "check the path or the id, and for a hub id the network and your access to it"
        raise ModelNotFoundError(f"{problem}: {first_line(error).rstrip('.')}; {remedy}") from error
    if rotary:
        rope_scaling.apply(config, rotary)
    return config


def _is_damaged(gguf_file: Path) -> bool:
    """True for a GGUF file that its own reader cannot read to the end."""
    from gguf import GGUFReader

    try:
        GGUFReader(gguf_file)
    except Exception:
        # Whatever slice or number the reader stumbles over.
        return True
    return False


def without_remote_code(model: ModelFiles) -> dict[str, Any]:
    """Return a model's location, with its own code forbidden unless allowed.

    Without an answer transformers asks for it on the terminal.
    """
    return {"trust_remote_code": False} | model.location


def refuse_remote_code(model: ModelFiles, error: Exception) -> None:
    """Refuse a model whose own code transformers would have to run."""
    if model.location.get("trust_remote_code") or "trust_remote_code=True" not in str(error):
        return
    code = (model.config or {}).get("auto_map") or {}
    names = sorted({str(name).rpartition(".")[0] + ".py" for name in code.values()})
    raise ModelNotFoundError(
        f"the model at {model.path} runs with code of its own"
        f"{' (' + ', '.join(names) + ')' if names else ''}, which is not run unless you allow it;"
        " read that code first, then give --trust-remote-code (in Python: trust_remote_code=True)"
    ) from error
