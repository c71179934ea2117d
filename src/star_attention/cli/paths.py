"""Checks that output can be written, made before anything slow starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from star_attention.cli.torchrun import rank_and_size
from star_attention.errors import ContextSaveError, InvalidInputError


def check_save_path(path: str | None) -> None:
    """Check that a context can be saved at `path`.

    Raises:
        ContextSaveError: If it cannot.
    """
    if path is None:
        return
    from star_attention.storage import header

    target = Path(path)
    header.check_target(target, as_folder=rank_and_size()[1] > 1)
    try:
        with tempfile.NamedTemporaryFile(
            prefix=f".{target.name[:32]}.", suffix=".part", dir=target.parent
        ):
            pass
    except OSError as error:
        raise ContextSaveError(
            f"cannot save the context to {target}: the folder {target.parent} is not writable"
            f" ({error.strerror}); choose another folder"
        ) from None


def check_output_folder(path: str) -> None:
    """Check that results can be written to the folder `path`, which need not exist.

    Raises:
        InvalidInputError: If they cannot.
    """
    existing = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    if not existing.is_dir():
        raise InvalidInputError(f"{existing} is not a folder; give another one with --out")
    if not os.access(existing, os.W_OK):
        raise InvalidInputError(
            f"the folder {existing} is not writable; give another one with --out"
        )
