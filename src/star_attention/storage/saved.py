"""Encoded contexts on disk, written atomically, mapped into memory, checked before they are used.

One process writes one file: an ordinary safetensors file (nothing in it is executable) whose
metadata holds a JSON header and the header's checksum. The header is verified when the file is
opened, each tensor when it is first read. Several ranks write a folder: such a file each, and an
index that holds the header and the checksum of every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from star_attention.distributed.comm import Comm
from star_attention.errors import ContextNotFoundError, ContextSaveError, CorruptContextError
from star_attention.planning.segments import Segments
from star_attention.storage.kv import NAMES, StoredKV

FORMAT_VERSION = 1
INDEX = "index.json"
_KEY = "star_attention"
_BRACE = b"{"  # behind the eight bytes of a header's length


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes, in hexadecimal."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def check_target(target: Path, *, as_folder: bool) -> None:
    """Whether a context may be saved there, `as_folder` by several ranks, or as a file.

    Raises `ContextSaveError` for a folder, for a file that is none of ours, and where there is no
    folder to hold it.
    """
    if target.is_dir() and (target / INDEX).is_file() and not as_folder:
        raise ContextSaveError(
            f"cannot save the context to {target}: it is a folder that several ranks saved, and one process writes a file;"
            " choose another name, or remove it first"
        )
    if target.is_dir() and not (target / INDEX).is_file():
        raise ContextSaveError(
            f"cannot save the context to {target}: it is a folder; give the name of a file"
        )
    if os.path.exists(target) and not is_saved(target):
        raise ContextSaveError(
            f"cannot save the context to {target}: it is a file of another kind, which would be lost; choose another name,"
            " or remove it first"
        )
    if not target.parent.is_dir():
        raise ContextSaveError(
            f"cannot save the context to {target}: the folder {target.parent} does not exist; {_home(target) or 'create it first'}"
        )


def as_path(path: Any) -> Path:
    """Raises `ContextSaveError` for what is no path."""
    try:
        return Path(path)
    except TypeError:
        raise ContextSaveError(
            f"cannot save the context to {path!r}: it is no path, but of type {type(path).__name__}; give a text or a pathlib.Path"
        ) from None


def _home(path: Path) -> str:
    """What helps with a name that a shell would have changed; "" for others."""
    is_tilde = len(path.parts) > 1 and path.parts[0].startswith("~")
    return (
        "~ is not expanded here: write the folder out (in Python: os.path.expanduser)"
        if is_tilde
        else ""
    )


def is_saved(path: Path) -> bool:
    """Whether a saved context stands there, whole or damaged: something that saving may replace."""
    if path.is_dir():
        return (path / INDEX).is_file()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def begins(data: bytes) -> bool:
    """Whether bytes are the beginning of a saved context: the length of its header, and the header with our key."""
    return data[8:9] == _BRACE and f'"{_KEY}":'.encode() in data[:256]


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write header and tensors to `path`: all of it or nothing.

    Raises `ContextSaveError` with the system's reason.
    """
    target = as_path(path)
    temporary: str | None = None
    try:
        check_target(target, as_folder=False)
        # Beside the target, so that the last step is a rename within one file system.
        descriptor, temporary = tempfile.mkstemp(
            prefix=f".{target.name[:32]}.", suffix=".part", dir=target.parent
        )
        os.close(descriptor)
        on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        entries = {
            name: {
                "sha256": checksum(tensor),
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
            }
            for name, tensor in on_cpu.items()
        }
        text = json.dumps(
            {"format_version": FORMAT_VERSION, **header, "tensors": entries}, sort_keys=True
        )
        save_file(
            on_cpu,
            temporary,
            metadata={_KEY: text, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for the owner only; the text may be private, so it stays that way.
        os.replace(temporary, target)
        temporary = None
    except ContextSaveError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise ContextSaveError(
            f"cannot save the context to {target}: {error}; free space or choose another place"
            " (a file that stood there before is untouched)"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_shared(
    path: str, header: dict[str, Any], segments: Segments, tensors: dict[str, Tensor], comm: Comm
) -> None:
    """The same for a context that several ranks hold; called by all of them.

    The folder is written beside its place and moved there when every rank is done.
    """
    target = Path(path)
    folder = Path(comm.run_on_rank_0(lambda: str(_new_folder(target))))
    try:
        name = f"rank-{comm.cp_rank}.safetensors"
        part: dict[str, Any] | None = None
        if tensors:
            if not folder.is_dir():
                raise ContextSaveError(
                    f"rank {comm.rank} does not see {folder}, which rank 0 made: save to a file system that all machines share"
                )
            write(folder / name, {"segments": segments}, tensors)
            part = {"file": name, "segments": segments, "sha256": SavedFile(folder / name).sha256}
        parts = [one for one in comm.gather(part) if one is not None]
        if comm.rank == 0:
            text = json.dumps(
                {"format_version": FORMAT_VERSION, **header, "parts": parts}, sort_keys=True
            )
            index = {"header": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
            _move(folder, target, json.dumps(index))
        comm.gather(None)  # nobody goes on before it is there
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _new_folder(target: Path) -> Path:
    check_target(target, as_folder=True)
    try:
        return Path(
            tempfile.mkdtemp(prefix=f".{target.name[:32]}.", suffix=".part", dir=target.parent)
        )
    except OSError as error:
        raise ContextSaveError(
            f"cannot save the context to {target}: {error}; choose another place"
        ) from error


def _move(folder: Path, target: Path, index: str) -> None:
    """Complete a written folder and put it where it belongs; what stood there goes last."""
    try:
        with open(folder / INDEX, "w", encoding="utf-8") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        old = folder.with_suffix(".old") if target.exists() else None
        if old is not None:  # a folder cannot be renamed over another one
            os.replace(target, old)
        os.replace(folder, target)
        if old is not None:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except OSError as error:
        raise ContextSaveError(
            f"cannot save the context to {target}: {error}; free space or choose another place"
        ) from error


_AGAIN = "encode the context again, or take a copy that is whole"


def _verified(path: Path, text: str, sha256: str) -> dict[str, Any]:
    """A header whose checksum is right and whose format is known."""
    if hashlib.sha256(text.encode()).hexdigest() != sha256:
        raise CorruptContextError(
            f"the header of {path} does not match its checksum: the file was changed; {_AGAIN}"
        )
    header: dict[str, Any] = json.loads(text)
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise CorruptContextError(
            f"{path} has format version {version}, this library reads version {FORMAT_VERSION};"
            " encode the context again or use the version that wrote it"
        )
    if not isinstance(header.get("tensors", header.get("parts")), (dict, list)):
        raise CorruptContextError(
            f"the header of {path} does not say what it holds: the file was changed; {_AGAIN}"
        )
    return header


class SavedContext:
    """An open saved context, of one file or of several ranks' files.

    Raises `CorruptContextError` for what is truncated, changed, or not a saved context, and
    `ContextNotFoundError` where there is nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._parts: list[tuple[Segments, SavedFile]] = []
        if not os.path.isdir(self.path):
            file = SavedFile(self.path)
            self.header = file.header
            self._parts.append((_segments(file.header["segments"]), file))
            return
        if not (self.path / INDEX).exists():
            raise CorruptContextError(
                f"{self.path} is a folder; give the file of a saved context, or the folder that several ranks saved"
            )
        try:
            index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            self.header = _verified(self.path, index["header"], index["sha256"])
        except CorruptContextError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptContextError(
                f"the folder {self.path} cannot be read as a saved context: its {INDEX} is missing, truncated or changed ({error});"
                f" {_AGAIN}"
            ) from error
        for part in self.header["parts"]:
            try:
                file = SavedFile(self.path / part["file"])
            except FileNotFoundError as error:
                raise CorruptContextError(
                    f"{self.path} lacks {part['file']}, one of the files of its ranks; {_AGAIN}"
                ) from error
            if file.sha256 != part["sha256"]:
                raise CorruptContextError(
                    f"{part['file']} in {self.path} belongs to another saved context"
                )
            self._parts.append((_segments(part["segments"]), file))

    def token_ids(self) -> Tensor:
        return self._parts[0][1].tensor("token_ids").clone()

    def has_layer(self, index: int) -> bool:
        return f"layers.{index}.k" in self._parts[0][1].header["tensors"]

    def layer(self, index: int, wanted: Segments) -> StoredKV:
        """What is stored of a layer for some tokens, `[1, G, tokens, ...]`, in that order.

        They are the file's own pages where one file holds just these.
        """
        for segments, file in self._parts:
            if segments == wanted:
                return file.layer(index)
        opened: dict[int, StoredKV] = {}
        pieces: list[StoredKV] = []
        for start, stop in wanted:
            while start < stop:
                number, at, end = self._find(start)
                if number not in opened:
                    opened[number] = self._parts[number][1].layer(index)
                tokens = min(stop, end) - start
                pieces.append(tuple(tensor[:, :, at : at + tokens] for tensor in opened[number]))
                start += tokens
        return tuple(torch.cat(parts, 2) for parts in zip(*pieces, strict=True))

    def _find(self, token: int) -> tuple[int, int, int]:
        """The part that holds a token, where it lies in it, and where its run ends."""
        for number, (segments, _) in enumerate(self._parts):
            for start, stop in segments:
                if start <= token < stop:
                    return number, segments.offset(token), stop
        raise CorruptContextError(
            f"{self.path} holds no keys for token {token:,}: the file was changed"
        )


def _segments(listed: list[list[int]]) -> Segments:
    return Segments((start, stop) for start, stop in listed)


class SavedFile:
    """One open file: `header` is verified, `tensor(name)` verifies what it returns.

    Raises `CorruptContextError` for a file that is truncated, changed, or not a saved context, and
    `ContextNotFoundError` where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not self.path.exists():
                raise ContextNotFoundError(
                    f"there is no saved context at {self.path};"
                    f" {_home(self.path) or 'check the path, or encode and save it first'}"
                )
            if self.path.is_dir():
                raise CorruptContextError(
                    f"{self.path} is a folder; give the file of a saved context"
                )
            self._file = safe_open(self.path, framework="pt", device="cpu")
            metadata = self._file.metadata() or {}
        except (FileNotFoundError, CorruptContextError):
            raise
        except (SafetensorError, OSError, ValueError) as error:
            if self._is_foreign():
                raise CorruptContextError(
                    f"{self.path} is no saved context: it does not begin like one; give what was saved, or encode the text first"
                ) from error
            raise CorruptContextError(
                f"{self.path} cannot be read as a saved context: it is truncated, changed or something else ({error});"
                f" {_AGAIN}"
            ) from error
        if _KEY not in metadata:
            raise CorruptContextError(
                f"{self.path} is a safetensors file, but not a saved context of star-attention"
            )
        text = metadata[_KEY]
        self.sha256 = str(metadata.get("sha256"))
        self.header = _verified(self.path, text, self.sha256)
        if set(self._file.keys()) != set(self.header["tensors"]):
            raise CorruptContextError(
                f"{self.path} does not hold the tensors that its header lists: the file was changed; {_AGAIN}"
            )

    def _is_foreign(self) -> bool:
        """Whether its beginning, as far as there is one and it can be read, is not the format's."""
        try:
            with open(self.path, "rb") as file:
                return file.read(9)[8:] not in (b"", _BRACE)
        except (OSError, ValueError):
            return False

    def layer(self, index: int) -> StoredKV:
        """All that is stored of a layer."""
        names = [f"layers.{index}.{name}" for name in NAMES]
        return tuple(self.tensor(name) for name in names if name in self.header["tensors"])

    def tensor(self, name: str) -> Tensor:
        """The tensor, on CPU, backed by the file's pages, after its checksum was verified."""
        entry = self.header["tensors"][name]
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptContextError(
                f"{name} cannot be read from {self.path}: {error}; {_AGAIN}"
            ) from error
        if (
            list(tensor.shape) != entry["shape"]
            or str(tensor.dtype) != entry["dtype"]
            or checksum(tensor) != entry["sha256"]
        ):
            raise CorruptContextError(
                f"{name} in {self.path} does not match its checksum: the file was changed or is damaged; {_AGAIN}"
            )
        return tensor
