"""Checks that output can be written, made before anything slow starts."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from star_attention.cli.torchrun import rank_and_size
from star_attention.errors import ContextSaveError, InvalidInputError, quote


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


def check_output_file(path: str) -> None:
    """Check that a result can be written to the file `path`.

    Raises:
        InvalidInputError: If it cannot.
    """
    target = Path(path)
    if target.is_dir():
        raise InvalidInputError(f"{quote(path)} is a folder; give a file with --out")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise InvalidInputError(
            f"the folder {quote(str(target.parent))} is not writable ({error.strerror}); give"
            " another file with --out"
        ) from None


def check_output_folder(path: str) -> None:
    """Check that results can be written to the folder `path`, which need not exist.

    Raises:
        InvalidInputError: If they cannot.
    """
    folders = [Path(path), *Path(path).parents]
    try:
        missing = [folder for folder in folders if not folder.exists()]
        existing = folders[len(missing)]
        if not existing.is_dir():
            raise InvalidInputError(f"{existing} is not a folder; give another one with --out")
        _try_to_write(missing, existing)
    except OSError as error:
        raise InvalidInputError(
            f"the folder {quote(path)} is not writable ({error.strerror}); give another one with"
            " --out"
        ) from None


def _try_to_write(missing: list[Path], existing: Path) -> None:
    """Make folders and a file in the last one, and remove them again."""
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        with tempfile.TemporaryFile(dir=made[-1] if made else existing):
            pass
    finally:
        for folder in reversed(made):
            # Another process may have put something there meanwhile.
            with contextlib.suppress(OSError):
                folder.rmdir()
