"""The header of a saved context, read and verified without torch. See `reading.py`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from star_attention.errors import (
    ContextNotFoundError,
    ContextSaveError,
    CorruptContextError,
    quote_path,
)
from star_attention.planning.lookback import ALL
from star_attention.planning.plan import BlockPlan

FORMAT_VERSION = 2
"""Version 2 added look-back. Version 1 is read, too."""
CONVERSATION_VERSION = 3
"""Version of a conversation without its context, which earlier releases are to refuse."""
WINDOWS_VERSION = 4
"""Version of a file in which layers with a sliding window lack tokens that others have."""
INDEX = "index.json"
METADATA_KEY = "star_attention"
# A safetensors file begins with the length of its header in eight bytes, then the header.
_HEADER_START = 8
_BRACE = b"{"

ENCODE_AGAIN = "encode the context again, or use an intact copy"


def text_checksum(text: str) -> str:
    """Return the SHA-256 of a header, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_saved(path: Path) -> bool:
    """True if a saved context, intact or damaged, is at `path`: saving may replace it."""
    if path.is_dir():
        return (path / INDEX).is_file()
    try:
        with safe_open(path, framework="numpy", device="cpu") as file:
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


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the header of a saved context: sizes, settings and identity.

    Args:
        path: the file, or the folder of several ranks.

    Raises:
        CorruptContextError: it is truncated, modified, or not a saved context.
        ContextNotFoundError: there is nothing at the path.
    """
    target = Path(path)
    if target.is_dir():
        return read_index(target)
    return header_of(target, open_safetensors(target, "numpy"))[0]


def header_of(path: Path, file: Any) -> tuple[dict[str, Any], str]:
    """Return the verified header of an open file, and its checksum."""
    metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        raise CorruptContextError(
            f"{path} is a safetensors file, but not a saved context of star-attention;"
            " give a file that EncodedContext.save wrote"
        )
    sha256 = str(metadata.get("sha256"))
    return verified_header(path, metadata[METADATA_KEY], sha256), sha256


def open_safetensors(path: Path, framework: str) -> Any:
    """Open a file for a framework ("pt", or "numpy" to leave torch out).

    Raises:
        CorruptContextError: it is no safetensors file, or is damaged.
        ContextNotFoundError: the file does not exist.
    """
    try:
        if not path.exists():
            remedy = tilde_remedy(path) or "check the path, or encode and save a context first"
            raise ContextNotFoundError(f"there is no saved context at {quote_path(path)}; {remedy}")
        if path.is_dir():
            raise CorruptContextError(f"{path} is a folder; give the file of a saved context")
        if not path.is_file():
            # A pipe would be waited for, and cannot be mapped into memory.
            raise CorruptContextError(f"{path} is a pipe or a device; give a file")
        return safe_open(path, framework=framework, device="cpu")
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
            f" something else ({getattr(error, 'strerror', None) or error}); {ENCODE_AGAIN}"
        ) from error


def _is_other_format(path: Path) -> bool:
    """True if the file can be read and does not begin like a safetensors file."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEADER_START + 1)[_HEADER_START:] not in (b"", _BRACE)
    except (OSError, ValueError):
        return False


def verified_header(path: Path, text: str, sha256: str) -> dict[str, Any]:
    """Parse a header after verifying its checksum and its format version."""
    if text_checksum(text) != sha256:
        raise CorruptContextError(
            f"the header of {path} does not match its checksum: the file was modified;"
            f" {ENCODE_AGAIN}"
        )
    header: dict[str, Any] = json.loads(text)
    version = header.get("format_version")
    if version not in range(1, WINDOWS_VERSION + 1):
        raise CorruptContextError(
            f"{path} has format version {version}, this library reads up to version"
            f" {WINDOWS_VERSION}; encode the context again, or use the version that wrote it"
        )
    if not isinstance(header.get("tensors", header.get("parts")), (dict, list)):
        raise CorruptContextError(
            f"the header of {path} lists no contents: the file was modified; {ENCODE_AGAIN}"
        )
    return header


def refuse_alone(path: str | os.PathLike[str], header: dict[str, Any]) -> None:
    """Raise `CorruptContextError` for the file of a conversation whose context is in another."""
    if "context_file" in header:
        raise CorruptContextError(
            f"{path} is a conversation, and the context that it is about is in"
            f" {quote_path(header['context_file'])}; load that, or the conversation with"
            " load_conversation (on the command line: `star-attention chat`)"
        )


def plan_in(header: dict[str, Any], ranks: int = 1) -> BlockPlan:
    """Return the plan of the context that a header describes, for a number of ranks."""
    return BlockPlan(
        context_tokens=header["context_tokens"],
        block_size=header["block_size"],
        anchor_size=header["anchor_size"],
        ranks=ranks,
        **lookback_in(header),
    )


def lookback_in(header: dict[str, Any]) -> dict[str, Any]:
    """Return the fields about look-back, which files of earlier versions lack."""
    return {
        "lookback": header.get("lookback", 0),
        "lookback_layers": header.get("lookback_layers", ALL),
    }


def read_index(folder: Path) -> dict[str, Any]:
    """Return the verified header in the index of several ranks' files."""
    if not (folder / INDEX).exists():
        raise CorruptContextError(
            f"{folder} is a folder; give the file of a saved context, or a folder that several"
            " ranks saved"
        )
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return verified_header(folder, index["header"], index["sha256"])
    except CorruptContextError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptContextError(
            f"the folder {folder} cannot be read as a saved context: its {INDEX} is missing,"
            f" truncated or modified ({error}); {ENCODE_AGAIN}"
        ) from error


def check_target(target: Path, *, as_folder: bool) -> None:
    """Check that a context may be saved to `target`.

    Args:
        target: the file or folder to write.
        as_folder: True if several ranks save a folder, False if one process saves a file.

    Raises:
        ContextSaveError: `target` is a folder or another kind of file, or its parent is missing.
    """
    is_shared = target.is_dir() and (target / INDEX).is_file()
    problem = ""
    if is_shared and not as_folder:
        problem = (
            "it is a folder that several ranks saved, and one process saves a file; choose another"
            " name, or remove it first"
        )
    elif target.is_dir() and not is_shared:
        problem = "it is a folder; give the name of a file"
    elif os.path.exists(target) and not is_saved(target):
        problem = (
            "it is a file of another kind, which would be lost; choose another name, or remove it"
            " first"
        )
    elif not target.parent.is_dir():
        remedy = tilde_remedy(target) or "create it first"
        problem = f"the folder {quote_path(target.parent)} does not exist; {remedy}"
    if problem:
        raise ContextSaveError(f"cannot save the context to {quote_path(target)}: {problem}")
