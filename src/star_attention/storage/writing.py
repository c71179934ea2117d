"""Writing saved contexts, atomically: all of a file or folder, or nothing. See `reading.py`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from star_attention.distributed import Comm
from star_attention.errors import ContextSaveError, quote, quote_path
from star_attention.storage.header import (
    FORMAT_VERSION,
    INDEX,
    METADATA_KEY,
    check_target,
    text_checksum,
)
from star_attention.storage.reading import SavedFile, checksum


def as_path(path: Any) -> Path:
    """Return `path` as a `Path`.

    Raises:
        ContextSaveError: it is neither a str nor a path.
    """
    try:
        return Path(path)
    except TypeError:
        raise ContextSaveError(
            f"cannot save the context to {quote(path)}: expected a str or Path, got"
            f" {type(path).__name__}"
        ) from None


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write header and tensors to a file.

    Raises:
        ContextSaveError: it cannot be written; the message gives the operating system's reason.
    """
    target = as_path(path)
    temporary: str | None = None
    try:
        check_target(target, as_folder=False)
        # Next to the target, so that the last step is a rename within one file system.
        descriptor, temporary = tempfile.mkstemp(
            prefix=f".{target.name[:32]}.", suffix=".part", dir=target.parent
        )
        os.close(descriptor)
        on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        text = _header_text(header | {"tensors": _entries(on_cpu)})
        save_file(on_cpu, temporary, metadata={METADATA_KEY: text, "sha256": text_checksum(text)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for the owner only. The text may be private, so this stays that way.
        os.replace(temporary, target)
        temporary = None
    except ContextSaveError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise ContextSaveError(
            f"cannot save the context to {quote_path(target)}: {_reason(error)}; free space or"
            " choose another place (a file that was there before is unchanged)"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_shared(
    path: str, header: dict[str, Any], place: dict[str, Any], tensors: dict[str, Tensor], comm: Comm
) -> None:
    """Write a context that several ranks hold to a folder. Collective.

    The folder is written under a temporary name, and renamed when every rank is done.

    Args:
        path: the folder.
        header: sizes, settings and identity of the context.
        place: what the header of this rank's file says of the tokens in it.
        tensors: what this rank writes; empty for ranks that write nothing.
        comm: the ranks.

    Raises:
        ContextSaveError: it cannot be written, or a rank does not see the folder.
    """
    target = Path(path)
    folder = Path(comm.run_on_rank_0(lambda: str(_new_folder(target))))
    try:
        part = _write_part(folder, place, tensors, comm) if tensors else None
        parts = [part for part in comm.gather(part) if part is not None]
        if comm.rank == 0:
            version = max(part.pop("format_version") for part in parts)
            text = _header_text(header | {"parts": parts, "format_version": version})
            index = {"header": text, "sha256": text_checksum(text)}
            _finish(folder, target, json.dumps(index))
        # No rank returns before the folder is in place.
        comm.gather(None)
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_part(
    folder: Path, place: dict[str, Any], tensors: dict[str, Tensor], comm: Comm
) -> dict[str, Any]:
    """Write this rank's file, and return its entry in the index, with the file's version."""
    if not folder.is_dir():
        raise ContextSaveError(
            f"rank {comm.rank} does not see {folder}, which rank 0 created; save to a file system"
            " that all machines share"
        )
    name = f"rank-{comm.cp_rank}.safetensors"
    write(folder / name, place, tensors)
    file = SavedFile(folder / name)
    return {
        "file": name,
        "segments": place["segments"],
        "sha256": file.sha256,
        "format_version": file.header["format_version"],
    }


def _entries(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the header's entry for every tensor."""
    return {
        name: {"sha256": checksum(tensor), "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        for name, tensor in tensors.items()
    }


def _header_text(header: dict[str, Any]) -> str:
    # Not sorted: chat templates write tools with their keys in the order in which they were given.
    return json.dumps({"format_version": FORMAT_VERSION, **header})


def _new_folder(target: Path) -> Path:
    check_target(target, as_folder=True)
    try:
        return Path(
            tempfile.mkdtemp(prefix=f".{target.name[:32]}.", suffix=".part", dir=target.parent)
        )
    except OSError as error:
        raise ContextSaveError(
            f"cannot save the context to {quote_path(target)}: {_reason(error)}; choose another"
            " place"
        ) from error


def _finish(folder: Path, target: Path, index: str) -> None:
    """Write the index and rename the folder; what was at `target` before is removed last."""
    try:
        with open(folder / INDEX, "w", encoding="utf-8") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        # A folder cannot be renamed over another one.
        old = folder.with_suffix(".old") if target.exists() else None
        if old is not None:
            os.replace(target, old)
        os.replace(folder, target)
        if old is not None:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except OSError as error:
        raise ContextSaveError(
            f"cannot save the context to {quote_path(target)}: {_reason(error)}; free space or"
            " choose another place"
        ) from error


def _reason(error: Exception) -> str:
    """Return what went wrong, without the path that the system's message repeats."""
    return str(getattr(error, "strerror", None) or error)
