"""What a user names as a model: a folder, a GGUF file, an adapter or a hub id.

`locate` finds out which, and refuses whatever cannot be loaded before torch is imported. Standard
library only; the hub's client is imported for hub ids.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from star_attention.errors import ModelNotFoundError, quote, quote_path
from star_attention.hf.loading import config_file, hub
from star_attention.hf.loading.config_file import check_is_no_pointer, read_json
from star_attention.hf.loading.packages import need_packages

LOCATION = (
    "trust_remote_code",
    "revision",
    "code_revision",
    "token",
    "subfolder",
    "cache_dir",
    "local_files_only",
    "gguf_file",
)
"""Arguments of `from_pretrained` that say where a model's files are."""

GGUF = ".gguf"
_GGUF_MAGIC = b"GGUF"
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# A projector of a vision model lies beside its language model.
_GGUF_PROJECTOR = "mmproj"

_HUB_URL = re.compile(r"(?:https?://(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+)")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1])
OTHER_WEIGHTS = {
    "consolidated*": "weights in the layout of their authors",
    "*.pth": "weights in the layout of their authors",
    "tf_model.h5": "TensorFlow weights",
    "flax_model*": "Flax weights",
    "*.onnx": "an ONNX model",
    "adapter_model.*": "an adapter without its adapter_config.json",
}
"""Files that transformers cannot load, with what they are."""

_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*")
_TOKENIZER_BESIDE_GGUF = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model that a user has named, before anything of it is loaded.

    Attributes:
        path: the model's folder, or its hub id.
        location: arguments of `from_pretrained` that say where in it the files are.
        adapter: folder or hub id of an adapter around the model; None without one.
        config: the contents of the folder's config.json; None where it is not here to be read.
    """

    path: str
    location: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    config: dict[str, Any] | None = None

    @property
    def folder(self) -> Path | None:
        """The folder with the model's files; None for a hub id."""
        folder = Path(self.path) / str(self.location.get("subfolder") or "")
        return folder if folder.is_dir() else None

    @property
    def gguf_file(self) -> Path | None:
        """The model's GGUF file; None without one, or if it is on the hub."""
        name = self.location.get("gguf_file")
        return self.folder / name if self.folder is not None and name else None

    @property
    def tokenizer_source(self) -> str | None:
        """The folder or hub id of the tokenizer: an adapter's own comes first; None if there is
        none."""
        if self.adapter is not None and _has_tokenizer(Path(self.adapter)):
            return self.adapter
        if self.folder is None or self.gguf_file is not None or _has_tokenizer(self.folder):
            return self.path
        return self.path if self.has_tokenizer_above else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder with the tokenizer's files; None if they are in a GGUF file or on the hub."""
        source = self.tokenizer_source
        if source is None or (self.gguf_file and not self.has_tokenizer_beside_gguf):
            return None
        is_elsewhere = source != self.path or self.has_tokenizer_above
        folder = Path(source) if is_elsewhere else self.folder
        return folder if folder is not None and folder.is_dir() else None

    @property
    def has_tokenizer_above(self) -> bool:
        """True if a model in a subfolder has no tokenizer of its own, but the outer folder does."""
        if self.folder is None or self.gguf_file or not self.location.get("subfolder"):
            return False
        return not _has_tokenizer(self.folder) and _has_tokenizer(Path(self.path))

    @property
    def has_tokenizer_beside_gguf(self) -> bool:
        """True if complete tokenizer files lie beside a GGUF file: they come before its own."""
        if self.folder is None or self.gguf_file is None:
            return False
        return all((self.folder / name).is_file() for name in _TOKENIZER_BESIDE_GGUF)


def locate(
    path: str | os.PathLike[str],
    location: dict[str, Any] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> ModelFiles:
    """Find out what a user means by a model's path.

    Args:
        path: a model folder, a GGUF file, a folder with a single GGUF file, an adapter's folder, or
            a hub id.
        location: arguments of `from_pretrained` (gguf_file, subfolder, revision, ...).
        adapter: folder or hub id of an adapter to load around the model.

    Raises:
        ModelNotFoundError: there is no model, or it is something else; says what to do.
        MissingPackageError: it is a GGUF file, and the package that reads them is not installed.
    """
    location = dict(location or {})
    if not isinstance(path, (str, os.PathLike)):
        raise ModelNotFoundError(
            f"{quote(path)} is not a model: expected the path of its folder or a hub id, got"
            f" {type(path).__name__}"
        )
    if not str(path).strip():
        raise ModelNotFoundError(
            "the model's path is empty; give the path of its folder, or a hub id"
        )
    folder = Path(path)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
        files = sorted(item.name for item in folder.iterdir()) if is_folder else []
    except OSError as error:
        # No permission, or a name that the file system does not allow.
        raise ModelNotFoundError(
            f"the model folder {quote_path(path)} cannot be read ({error.strerror}); check the path"
        ) from error
    if adapter is not None:
        adapter = _checked_adapter(adapter)
    if is_folder and ADAPTER_CONFIG in files:
        return _locate_base(folder, location, adapter)
    if is_folder:
        return _in_folder(folder, location, adapter)
    if exists:
        return _gguf(folder.parent, folder.name, location, adapter)
    return _on_the_hub(path, location, adapter)


# ------------------------------------------------------------------------------------------ folders


def _in_folder(folder: Path, location: dict[str, Any], adapter: str | None) -> ModelFiles:
    """Locate a model in a folder: the GGUF file that is asked for, or config.json and weights."""
    inner = folder / str(location.get("subfolder") or "")
    if not inner.is_dir():
        raise ModelNotFoundError(
            f"the folder {folder} has no subfolder {location['subfolder']}; check its name"
        )
    name = location.get("gguf_file")
    if name is not None:
        return _gguf(folder, name, location, adapter)
    files = sorted(item.name for item in inner.iterdir())
    ggufs = [
        name
        for name in files
        if name.lower().endswith(GGUF) and not name.lower().startswith(_GGUF_PROJECTOR)
    ]
    if ggufs and not any(name in files for name in WEIGHTS):
        if len(ggufs) > 1 and not any(_GGUF_PART.search(name) for name in ggufs):
            raise ModelNotFoundError(
                f"the folder {inner} holds {len(ggufs)} GGUF files, {ggufs[0]}, {ggufs[1]}"
                f"{', ...' if len(ggufs) > 2 else ''}; give the path of one of them"
            )
        return _gguf(folder, ggufs[0], location, adapter)
    if "config.json" not in files:
        raise ModelNotFoundError(_without_config(inner))
    own_code = bool(location.get("trust_remote_code"))
    config = config_file.read(inner, own_code=own_code)
    return ModelFiles(path=str(folder), location=location, adapter=adapter, config=config)


def _without_config(folder: Path) -> str:
    """Return the error for a folder without config.json."""
    problem = f"the folder {folder} holds no config.json"
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if (folder / "model_index.json").is_file():
        return f"{problem}: it is a pipeline for images; give a language model"
    if snapshots:
        return f"{problem}: it is a folder of the hub's cache; give {snapshots[-1].parent}"
    if inner:
        return (
            f"{problem}, but its subfolder {inner[0]} does: give {folder / inner[0]}, or"
            f" --subfolder {inner[0]} (in Python: subfolder={quote(inner[0])})"
        )
    for pattern, kind in OTHER_WEIGHTS.items():
        if any(folder.glob(pattern)):
            return (
                f"{problem}, but {kind}: it is not a transformers model folder; convert it, or"
                " download the version for transformers"
            )
    return (
        f"{problem}: it is not a transformers model folder; give a folder that contains one, or a"
        " hub id"
    )


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


# --------------------------------------------------------------------------------------------- GGUF


def _gguf(folder: Path, name: str, location: dict[str, Any], adapter: str | None) -> ModelFiles:
    """Locate a model in a GGUF file.

    Raises:
        ModelNotFoundError: the file is missing, or is not a complete GGUF file.
        MissingPackageError: the package that reads it is not installed.
    """
    path = folder / str(location.get("subfolder") or "") / name
    if location.get("gguf_file") not in (None, name):
        raise ModelNotFoundError(
            f"{path} and gguf_file={quote(location['gguf_file'])} name two files; leave one of them"
            " out"
        )
    if not path.is_file():
        problem = f"there is no GGUF file {path}"
        if path.exists():
            problem = f"{path} is neither a folder nor a file"
        raise ModelNotFoundError(f"{problem}; check the path")
    check_is_no_pointer(path)
    with open(path, "rb") as file:
        is_gguf = file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    if not is_gguf and not name.lower().endswith(GGUF):
        raise ModelNotFoundError(f"{path} is a file; give the model's folder, or a hub id")
    if not is_gguf:
        raise ModelNotFoundError(
            f"{path} is not a GGUF file: it does not begin like one; copy or download it again"
        )
    if _GGUF_PART.search(name):
        raise ModelNotFoundError(
            f"{path} is one part of a GGUF file; join the parts with llama.cpp's"
            " `llama-gguf-split --merge`, and give the result"
        )
    need_packages(["gguf", "accelerate"], f"{path} is a GGUF file")
    # transformers looks for a GGUF file's tokenizer in the folder itself.
    location = {name: value for name, value in location.items() if name != "subfolder"}
    return ModelFiles(
        path=str(path.parent), location=location | {"gguf_file": path.name}, adapter=adapter
    )


# ----------------------------------------------------------------------------------------- adapters


def _checked_adapter(adapter: str | os.PathLike[str]) -> str:
    """Check that an adapter's folder, if it is here, holds an adapter that can run."""
    if not isinstance(adapter, (str, os.PathLike)):
        raise ModelNotFoundError(
            f"{quote(adapter)} is not an adapter: expected the path of its folder or a hub id, got"
            f" {type(adapter).__name__}"
        )
    folder = Path(adapter)
    if not folder.is_dir():
        _check_may_be_hub_id(adapter, "adapter folder")
        cached = hub.check(str(adapter), ADAPTER_CONFIG, {}, kind="adapter")
        return str(adapter if cached is None else cached)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelNotFoundError(
            f"the folder {folder} holds no {ADAPTER_CONFIG}: it is not an adapter; give the folder"
            " that peft saved"
        )
    weights = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not weights and any((folder / name).is_file() for name in WEIGHTS):
        raise ModelNotFoundError(
            f"the folder {folder} holds a model's weights and the config of an adapter, but not the"
            f" adapter's weights; if it was merged into them, remove {ADAPTER_CONFIG}"
        )
    if not weights:
        raise ModelNotFoundError(
            f"the adapter at {folder} has no weights ({ADAPTER_WEIGHTS[0]}); copy or download"
            " them, too"
        )
    check_is_no_pointer(weights[0])
    return str(folder)


def _locate_base(
    folder: Path, location: dict[str, Any], adapter: str | os.PathLike[str] | None
) -> ModelFiles:
    """Locate the base model that an adapter's folder names."""
    if adapter is not None:
        raise ModelNotFoundError(
            f"{folder} is an adapter, and so is {adapter}; give the base model, and one adapter"
        )
    own = _checked_adapter(folder)
    settings = read_json(folder / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    remedy = "give the base model's path, and this folder with --adapter (in Python: adapter=)"
    if not base:
        raise ModelNotFoundError(f"the adapter at {folder} does not name its base model; {remedy}")
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ModelNotFoundError(f"the base model of {folder}, {base}, is an adapter; {remedy}")
    if settings.get("revision") and not Path(base).exists():
        location = {"revision": settings["revision"]} | location
    try:
        return locate(base, location, own)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{folder} is an adapter of {base}, which cannot be loaded ({error}); {remedy}"
        ) from error


# -------------------------------------------------------------------------------------------- hub


def _on_the_hub(
    path: str | os.PathLike[str], location: dict[str, Any], adapter: str | None
) -> ModelFiles:
    """Locate a model on the hub, after checking that no folder was meant."""
    is_gguf = Path(path).suffix.lower() == GGUF
    _check_may_be_hub_id(path, "GGUF file" if is_gguf else "model folder", is_path=is_gguf)
    gguf = location.get("gguf_file")
    if gguf is not None:
        need_packages(["gguf", "accelerate"], f"{gguf} is a GGUF file")
    cached = hub.check(str(path), gguf or "config.json", location)
    if cached is not None:
        return _in_folder(cached, location, adapter)
    return ModelFiles(path=str(path), location=location, adapter=adapter)


def _check_may_be_hub_id(path: str | os.PathLike[str], kind: str, *, is_path: bool = False) -> None:
    """Raise `ModelNotFoundError` if a path that does not exist can be nothing but a path."""
    folder = Path(path)
    # `models/needle` may be a hub id, but if there is a folder `models` here, a path was meant.
    is_path = (
        is_path
        or folder.is_absolute()
        or str(path).startswith(".")
        or (len(folder.parts) > 1 and folder.parent.is_dir())
    )
    if is_path or not hub.ID.fullmatch(str(path)):
        raise ModelNotFoundError(
            f"there is no {kind} {quote_path(path)}; {_path_remedy(str(path))}"
        )


def _path_remedy(path: str) -> str:
    """Return what to do about a path that does not exist."""
    url = _HUB_URL.match(path)
    if url is not None:
        return f"give its hub id, {url[1]}"
    if path.startswith("~"):
        return "~ is not expanded here: write the whole path"
    return "check the path, or give a hub id like organization/name"
