"""Files of encoded contexts: one safetensors file, written atomically, mapped into memory, checked before it is used.

The file is an ordinary safetensors file (nothing in it is executable) whose metadata holds a JSON header and the
header's checksum. The header is verified when the file is opened, each tensor when it is first touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from star_attention.errors import ContextSaveError, CorruptContextError

FORMAT_VERSION = 1
_KEY = "star_attention"


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes, in hexadecimal."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def check_target(target: Path) -> None:
    """Whether a file can stand there at all.

    Raises `ContextSaveError` for a folder, or for a file in a folder that does not exist.
    """
    if target.is_dir():
        raise ContextSaveError(f"cannot save the context to {target}: it is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise ContextSaveError(
            f"cannot save the context to {target}: the folder {target.parent} does not exist; create it first"
        )


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write header and tensors to `path`: all of it or nothing.

    Raises `ContextSaveError` with the system's reason.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        check_target(target)
        # Beside the target, so that the last step is a rename within one file system.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name[:32]}.", suffix=".part", dir=target.parent)
        os.close(descriptor)
        on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        entries = {
            name: {"sha256": checksum(tensor), "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
            for name, tensor in on_cpu.items()
        }
        text = json.dumps({"format_version": FORMAT_VERSION, **header, "tensors": entries}, sort_keys=True)
        save_file(on_cpu, temporary, metadata={_KEY: text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
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


class SavedContext:
    """An open context file: `header` is verified, `tensor(name)` verifies what it returns.

    Raises `CorruptContextError` for a file that is truncated, changed, or not a saved context, and
    `FileNotFoundError` (as `open` does) where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not self.path.exists():
                raise FileNotFoundError(f"there is no saved context at {self.path}")
            if self.path.is_dir():
                raise CorruptContextError(f"{self.path} is a folder; give the file of a saved context")
            self._file = safe_open(self.path, framework="pt", device="cpu")
            metadata = self._file.metadata() or {}
        except (FileNotFoundError, CorruptContextError):
            raise
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptContextError(
                f"{self.path} cannot be read as a saved context: it is truncated, changed or something else ({error})"
            ) from error
        if _KEY not in metadata:
            raise CorruptContextError(f"{self.path} is a safetensors file, but not a saved context of star-attention")
        text = metadata[_KEY]
        if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
            raise CorruptContextError(f"the header of {self.path} does not match its checksum: the file was changed")
        self.header: dict[str, Any] = json.loads(text)
        version = self.header.get("format_version")
        if version != FORMAT_VERSION:
            raise CorruptContextError(
                f"{self.path} has format version {version}, this library reads version {FORMAT_VERSION};"
                " encode the context again or use the version that wrote it"
            )
        if set(self._file.keys()) != set(self.header["tensors"]):
            raise CorruptContextError(
                f"{self.path} does not hold the tensors that its header lists: the file was changed"
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor, on CPU, backed by the file's pages, after its checksum was verified."""
        entry = self.header["tensors"][name]
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptContextError(f"{name} cannot be read from {self.path}: {error}") from error
        if (
            list(tensor.shape) != entry["shape"]
            or str(tensor.dtype) != entry["dtype"]
            or checksum(tensor) != entry["sha256"]
        ):
            raise CorruptContextError(
                f"{name} in {self.path} does not match its checksum: the file was changed or is damaged"
            )
        return tensor
