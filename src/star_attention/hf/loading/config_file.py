"""A model's config.json: read, and checked for what transformers would refuse, without torch.

transformers words its own refusals, but importing its configs takes seconds.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from star_attention.errors import ModelNotFoundError, quote

NAME = "config.json"

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields that are whole numbers in every family (a few have lists of them, by layer)."""

_REMEDY = "copy or download the model again"
_DIVIDES = "self.hidden_size % self.num_attention_heads != 0"
_AUTO = "transformers.models.auto.configuration_auto"
_LFS_START = b"version https://git-lfs"


def read(folder: Path, *, own_code: bool) -> dict[str, Any]:
    """Return the contents of a folder's config.json.

    Args:
        folder: the folder, which has one.
        own_code: True if the model's own code, which may define its config, may run.

    Raises:
        ModelNotFoundError: transformers could not make a config of it.
    """
    file = folder / NAME
    check_is_no_pointer(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(folder, f"{NAME} cannot be opened ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise _unreadable(folder, f"{NAME} is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(folder, f"{NAME} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise _unreadable(folder, f"{NAME} holds {quote(config)}, expected an object of settings")
    if "auto_map" in config or own_code:
        return config
    _check_family(folder, config)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        problem = _problem(part)
        if problem is not None:
            raise _unreadable(folder, problem)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file; {} if it holds no object.

    transformers words what is wrong with it.
    """
    check_is_no_pointer(path)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def check_is_no_pointer(path: Path) -> None:
    """Refuse a small text file that git LFS puts in place of a large one."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_LFS_START)) == _LFS_START
    except OSError:
        return
    if is_pointer:
        raise ModelNotFoundError(
            f"{path} is a pointer of git LFS, not the file itself; run `git lfs pull` in its"
            " folder, or download it again"
        )


def family_file(family: Any, kind: str) -> str:
    """Return the source of a family in transformers; "" if it is not where it is expected.

    Args:
        family: the model type that a config names.
        kind: "modeling" or "configuration".
    """
    if not isinstance(family, str) or not re.fullmatch(r"[\w.-]+", family):
        return ""
    name = family.replace("-", "_")
    # Some families share the folder of another.
    return _source(f"models/{name}/{kind}_{name}.py")


def _unreadable(folder: Path, problem: str, remedy: str = _REMEDY) -> ModelNotFoundError:
    return ModelNotFoundError(f"no model could be read at {folder}: {problem}; {remedy}")


def _check_family(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a config of no family, or of one that this version of transformers does not know."""
    family = config.get("model_type")
    if not family or not isinstance(family, str):
        raise _unreadable(folder, f"{NAME} does not say what kind of model it is (model_type)")
    if not is_known(family):
        raise _unreadable(
            folder,
            f"transformers {version('transformers')} does not know models of type {quote(family)}",
            "update transformers, or check model_type in config.json",
        )


def is_known(family: str) -> bool:
    """Return True if transformers may have a config of a family."""
    loaded = sys.modules.get(_AUTO)
    if loaded is not None:
        # Users may have registered families of their own.
        return family in loaded.CONFIG_MAPPING
    texts = [_source(f"models/auto/{name}.py") for name in ("auto_mappings", "configuration_auto")]
    return not any(texts) or any(f'"{family}"' in text for text in texts)


def _problem(part: dict[str, Any]) -> str | None:
    """Return what is wrong with a config, or its part for text; None if text shows nothing."""
    for name in _COUNTS:
        value = part.get(name)
        if isinstance(value, (str, bool)):
            return f"{NAME} has {name} {quote(value)}, expected a whole number"
    hidden, heads = part.get("hidden_size"), part.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or not hidden % heads:
        return None
    if _DIVIDES not in family_file(part.get("model_type"), "configuration"):
        return None
    return f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"


def _source(name: str) -> str:
    """Return a file of transformers as text; "" if there is none."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return ""
    try:
        return (Path(spec.origin).parent / name).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
