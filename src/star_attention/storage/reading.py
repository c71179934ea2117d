"""Saved contexts: the file format, and reading it with every checksum verified.

One process saves one file: an ordinary safetensors file (nothing in it is executable) whose
metadata holds a JSON header and the header's checksum. The header is verified when the file is
opened, each tensor when it is first read; tensors are mapped into memory. Several ranks save a
folder: such a file each, and an index that holds the header and the checksum of every file.
Writing is in `writing.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from star_attention.errors import ContextNotFoundError, CorruptContextError, quote_path
from star_attention.planning.segments import Segments
from star_attention.storage.kv import NAMES, StoredKV

FORMAT_VERSION = 1
INDEX = "index.json"
METADATA_KEY = "star_attention"
# A safetensors file begins with the length of its header in eight bytes, then the header.
_HEADER_START = 8
_BRACE = b"{"

_ENCODE_AGAIN = "encode the context again, or use an intact copy"


def checksum(tensor: Tensor) -> str:
    """Return the SHA-256 of a CPU tensor's bytes, in hexadecimal."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def text_checksum(text: str) -> str:
    """Return the SHA-256 of a header, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_saved(path: Path) -> bool:
    """True if a saved context, intact or damaged, is at `path`: saving may replace it."""
    if path.is_dir():
        return (path / INDEX).is_file()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def is_saved_header(data: bytes) -> bool:
    """True if `data` begins like a saved context: a header's length, and a header with our key."""
    starts_header = data[_HEADER_START : _HEADER_START + 1] == _BRACE
    return starts_header and f'"{METADATA_KEY}":'.encode() in data[:256]


def tilde_remedy(path: Path) -> str:
    """Return the remedy for a path that a shell would have expanded; "" for other paths."""
    if len(path.parts) > 1 and path.parts[0].startswith("~"):
        return "~ is not expanded here: write the folder out (in Python: os.path.expanduser)"
    return ""


class SavedContext:
    """An open saved context, of one file or of several ranks' files.

    Attributes:
        path: the file or folder.
        header: sizes, settings and identity of the context, verified.

    Raises:
        CorruptContextError: it is truncated, modified, or not a saved context.
        ContextNotFoundError: there is nothing at the path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._parts: list[tuple[Segments, SavedFile]] = []
        if not os.path.isdir(self.path):
            file = SavedFile(self.path)
            self.header = file.header
            self._parts.append((_segments(file.header["segments"]), file))
            return
        self.header = _read_index(self.path)
        for part in self.header["parts"]:
            self._parts.append((_segments(part["segments"]), _open_part(self.path, part)))

    def token_ids(self) -> Tensor:
        """Return the context's token ids, int64 `[tokens]`."""
        return self._parts[0][1].tensor("token_ids").clone()

    def has_layer(self, index: int) -> bool:
        """True if layer `index` has keys and values of its own."""
        return f"layers.{index}.k" in self._parts[0][1].header["tensors"]

    def layer(self, index: int, segments: Segments) -> StoredKV:
        """Return a layer's tensors for some tokens, `[1, G, tokens, ...]`.

        Tokens come in the order of `segments`. The tensors are the file's own pages if one file
        holds exactly these tokens.
        """
        for part_segments, file in self._parts:
            if part_segments == segments:
                return file.layer(index)
        layers: dict[int, StoredKV] = {}
        pieces: list[StoredKV] = []
        for start, stop in segments:
            while start < stop:
                part, offset, end = self._find(start)
                if part not in layers:
                    layers[part] = self._parts[part][1].layer(index)
                tokens = min(stop, end) - start
                pieces.append(
                    tuple(tensor[:, :, offset : offset + tokens] for tensor in layers[part])
                )
                start += tokens
        return tuple(torch.cat(parts, 2) for parts in zip(*pieces, strict=True))

    def _find(self, token: int) -> tuple[int, int, int]:
        """Return the part that holds a token, its offset in that part, and the end of its run."""
        for part, (segments, _) in enumerate(self._parts):
            for start, stop in segments:
                if start <= token < stop:
                    return part, segments.offset(token), stop
        raise CorruptContextError(
            f"{self.path} holds no keys for token {token:,}: the file was modified; {_ENCODE_AGAIN}"
        )


class SavedFile:
    """One open file of a saved context.

    Attributes:
        path: the file.
        header: its header, verified.
        sha256: checksum of the header.

    Raises:
        CorruptContextError: it is truncated, modified, or not a saved context.
        ContextNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: Any = _open_safetensors(self.path)
        metadata = self._file.metadata() or {}
        if METADATA_KEY not in metadata:
            raise CorruptContextError(
                f"{self.path} is a safetensors file, but not a saved context of star-attention;"
                " give a file that EncodedContext.save wrote"
            )
        self.sha256 = str(metadata.get("sha256"))
        self.header = _verified_header(self.path, metadata[METADATA_KEY], self.sha256)
        if set(self._file.keys()) != set(self.header["tensors"]):
            raise CorruptContextError(
                f"{self.path} does not hold the tensors that its header lists: the file was"
                f" modified; {_ENCODE_AGAIN}"
            )

    def layer(self, index: int) -> StoredKV:
        """Return the stored tensors of a layer."""
        names = [f"layers.{index}.{name}" for name in NAMES]
        return tuple(self.tensor(name) for name in names if name in self.header["tensors"])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the CPU, backed by the file's pages, after verifying its checksum."""
        entry = self.header["tensors"][name]
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptContextError(
                f"{name} cannot be read from {self.path}: {error}; {_ENCODE_AGAIN}"
            ) from error
        if (
            list(tensor.shape) != entry["shape"]
            or str(tensor.dtype) != entry["dtype"]
            or checksum(tensor) != entry["sha256"]
        ):
            raise CorruptContextError(
                f"{name} in {self.path} does not match its checksum: the file was modified or is"
                f" damaged; {_ENCODE_AGAIN}"
            )
        return tensor


def _segments(pairs: list[list[int]]) -> Segments:
    return Segments((start, stop) for start, stop in pairs)


def _open_safetensors(path: Path) -> Any:
    try:
        if not path.exists():
            remedy = tilde_remedy(path) or "check the path, or encode and save a context first"
            raise ContextNotFoundError(f"there is no saved context at {quote_path(path)}; {remedy}")
        if path.is_dir():
            raise CorruptContextError(f"{path} is a folder; give the file of a saved context")
        return safe_open(path, framework="pt", device="cpu")
    except (FileNotFoundError, CorruptContextError):
        raise
    except (SafetensorError, OSError, ValueError) as error:
        if _is_other_format(path):
            raise CorruptContextError(
                f"{path} is not a saved context: it does not begin like one; give a file that"
                " EncodedContext.save wrote, or encode the text first"
            ) from error
        raise CorruptContextError(
            f"{quote_path(path)} cannot be read as a saved context: it is truncated, modified or"
            f" something else ({getattr(error, 'strerror', None) or error}); {_ENCODE_AGAIN}"
        ) from error


def _is_other_format(path: Path) -> bool:
    """True if the file can be read and does not begin like a safetensors file."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEADER_START + 1)[_HEADER_START:] not in (b"", _BRACE)
    except (OSError, ValueError):
        return False


def _verified_header(path: Path, text: str, sha256: str) -> dict[str, Any]:
    """Parse a header after verifying its checksum and its format version."""
    if text_checksum(text) != sha256:
        raise CorruptContextError(
            f"the header of {path} does not match its checksum: the file was modified;"
            f" {_ENCODE_AGAIN}"
        )
    header: dict[str, Any] = json.loads(text)
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise CorruptContextError(
            f"{path} has format version {version}, this library reads version {FORMAT_VERSION};"
            " encode the context again, or use the version that wrote it"
        )
    if not isinstance(header.get("tensors", header.get("parts")), (dict, list)):
        raise CorruptContextError(
            f"the header of {path} lists no contents: the file was modified; {_ENCODE_AGAIN}"
        )
    return header


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        raise CorruptContextError(
            f"{folder} is a folder; give the file of a saved context, or a folder that several"
            " ranks saved"
        )
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return _verified_header(folder, index["header"], index["sha256"])
    except CorruptContextError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptContextError(
            f"the folder {folder} cannot be read as a saved context: its {INDEX} is missing,"
            f" truncated or modified ({error}); {_ENCODE_AGAIN}"
        ) from error


def _open_part(folder: Path, part: dict[str, Any]) -> SavedFile:
    try:
        file = SavedFile(folder / part["file"])
    except FileNotFoundError as error:
        raise CorruptContextError(
            f"{folder} lacks {part['file']}, the file of one of its ranks; {_ENCODE_AGAIN}"
        ) from error
    if file.sha256 != part["sha256"]:
        raise CorruptContextError(
            f"{part['file']} in {folder} belongs to another saved context; {_ENCODE_AGAIN}"
        )
    return file
