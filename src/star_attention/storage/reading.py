"""Saved contexts: the file format, and reading it with every checksum verified.

One process saves one file: an ordinary safetensors file (nothing in it is executable) whose
metadata holds a JSON header and the header's checksum. The header is verified when the file is
opened, each tensor when it is first read; tensors are mapped into memory. Several ranks save a
folder: such a file each, and an index that holds the header and the checksum of every file.
The header is in `header.py`, writing in `writing.py`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from star_attention.errors import CorruptContextError
from star_attention.planning.segments import Segments
from star_attention.storage.header import (
    ENCODE_AGAIN,
    header_of,
    open_safetensors,
    read_index,
    refuse_alone,
)
from star_attention.storage.kv import NAMES, StoredKV


def checksum(tensor: Tensor) -> str:
    """Return the SHA-256 of a CPU tensor's bytes, in hexadecimal."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


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
            refuse_alone(self.path, file.header)
            self._parts.append((_segments(file.header["segments"]), file))
            return
        self.header = read_index(self.path)
        for part in self.header["parts"]:
            self._parts.append((_segments(part["segments"]), _open_part(self.path, part)))

    def token_ids(self) -> Tensor:
        """Return the context's token ids, int64 `[tokens]`."""
        return self._parts[0][1].tensor("token_ids").clone()

    def text(self) -> str | None:
        """Return the context's text; None for chats and token ids, and in files without one."""
        file = self._parts[0][1]
        if "text" not in file.header["tensors"]:
            return None
        return bytes(file.tensor("text").numpy()).decode()

    def has_layer(self, index: int) -> bool:
        """True if layer `index` has keys and values of its own."""
        name = f"layers.{index}.k"
        return any(name in file.header["tensors"] for _, file in self._parts)

    def layer(self, index: int, segments: Segments) -> StoredKV:
        """Return a layer's tensors for some tokens, `[1, G, tokens, ...]`.

        Tokens come in the order of `segments`. The tensors are the file's own pages if one file
        holds exactly these tokens.
        """
        kept = [file.kept(index, own) for own, file in self._parts]
        for (_, file), own in zip(self._parts, kept, strict=True):
            if own == segments:
                return file.layer(index)
        layers: dict[int, StoredKV] = {}
        pieces: list[StoredKV] = []
        for start, stop in segments:
            while start < stop:
                part, offset, end = self._find(start, kept)
                if part not in layers:
                    layers[part] = self._parts[part][1].layer(index)
                tokens = min(stop, end) - start
                pieces.append(
                    tuple(tensor[:, :, offset : offset + tokens] for tensor in layers[part])
                )
                start += tokens
        return tuple(torch.cat(parts, 2) for parts in zip(*pieces, strict=True))

    def _find(self, token: int, kept: list[Segments]) -> tuple[int, int, int]:
        """Return the part that holds a token, its offset in that part, and the end of its run."""
        for part, segments in enumerate(kept):
            for start, stop in segments:
                if start <= token < stop:
                    return part, segments.offset(token), stop
        raise CorruptContextError(
            f"{self.path} holds no keys for token {token:,}: the file was modified; {ENCODE_AGAIN}"
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
        self._file: Any = open_safetensors(self.path, "pt")
        self.header, self.sha256 = header_of(self.path, self._file)
        if set(self._file.keys()) != set(self.header["tensors"]):
            raise CorruptContextError(
                f"{self.path} does not hold the tensors that its header lists: the file was"
                f" modified; {ENCODE_AGAIN}"
            )

    def kept(self, index: int, segments: Segments) -> Segments:
        """Return the tokens that the file holds of a layer, given those that it holds of others."""
        kept: dict[str, Any] = self.header.get("kept", {})
        return _segments(kept[str(index)]) if str(index) in kept else segments

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
                f"{name} cannot be read from {self.path}: {error}; {ENCODE_AGAIN}"
            ) from error
        if (
            list(tensor.shape) != entry["shape"]
            or str(tensor.dtype) != entry["dtype"]
            or checksum(tensor) != entry["sha256"]
        ):
            raise CorruptContextError(
                f"{name} in {self.path} does not match its checksum: the file was modified or is"
                f" damaged; {ENCODE_AGAIN}"
            )
        return tensor


def _segments(pairs: list[list[int]]) -> Segments:
    return Segments((start, stop) for start, stop in pairs)


def _open_part(folder: Path, part: dict[str, Any]) -> SavedFile:
    try:
        file = SavedFile(folder / part["file"])
    except FileNotFoundError as error:
        raise CorruptContextError(
            f"{folder} lacks {part['file']}, the file of one of its ranks; {ENCODE_AGAIN}"
        ) from error
    if file.sha256 != part["sha256"]:
        raise CorruptContextError(
            f"{part['file']} in {folder} belongs to another saved context; {ENCODE_AGAIN}"
        )
    return file
