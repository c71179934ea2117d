"""The folder of a store: three files for each context, and nothing that a client names.

`ctx_….json` says whose it is and when it was used, sealed by the server's secret; `ctx_….content`
has its token ids and messages, and `ctx_….star` its keys and values, as `EncodedContext.save`
writes them: a folder on several ranks. The last may be missing: the context is cold then. A file is
written under another name and renamed; the `.json` file comes last, and without it the others do
not count.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np

from star_attention.errors import InvalidInputError, quote_path
from star_attention.serve.contexts.entry import Content, Entry, Status
from star_attention.serve.contexts.keys import KeyMaker, Scope, as_ids

_log = logging.getLogger(__name__)

_SECRET, _ASIDE, _LOCK = "secret", "aside", "lock"
_SECRET_BYTES = 32
_RECORD, _CONTENT, _KEYS = ".json", ".content", ".star"
_SAVED_FIELDS = (
    "created_at",
    "last_used_at",
    "listed",
    "ttl",
    "marked",
    "pinned",
    "name",
    "hits",
    "nbytes",
)


class CanSave(Protocol):
    """A context that can be saved."""

    def save(self, path: Path) -> None:
        """Write it to a file, atomically."""


class StoreFolder:
    """Files of contexts, of one model with one group of settings.

    Args:
        folder: the store, made if it is missing. Contexts of other models have folders of their own
            in it, and wait there.
        identity: digest of the engine (`identity_digest`).

    Attributes:
        keys: makes keys with the store's secret.
        moved_aside: files that were damaged or foreign, since the start.

    Raises:
        InvalidInputError: the folder cannot be written, or another server uses it.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: bytes) -> None:
        self._folder = Path(folder)
        self._own = self._folder / identity.hex()[:16]
        self.moved_aside = 0
        try:
            for path in (self._folder, self._own, self._folder / _ASIDE):
                path.mkdir(mode=0o700, exist_ok=True)
            self._folder.chmod(0o700)
            self._lock = _locked(self._folder / _LOCK)
            self.keys = KeyMaker(self._read_secret(), identity)
        except OSError as error:
            raise InvalidInputError(
                f"the store {quote_path(self._folder)} cannot be used: {error.strerror or error};"
                " give a folder that this user may write"
            ) from error

    def path_of(self, entry: Entry) -> Path:
        """Return where a context's keys and values are."""
        return self._path(entry.id, _KEYS)

    def save(self, entry: Entry, context: CanSave) -> None:
        """Write a context with its keys and values.

        Raises:
            ContextSaveError, OSError: it cannot be written; what was there before is unchanged.
        """
        self.write_content(entry)
        context.save(self.path_of(entry))
        # Writing takes a while: a client may have deleted it, and it must not come back.
        if not entry.deleted:
            self.write_record(entry)

    def write_content(self, entry: Entry) -> None:
        """Write what a context is made of, if it is not there."""
        content = entry.content
        assert content is not None, "an expired context is not written"
        path = self._path(entry.id, _CONTENT)
        if not path.exists():
            fields = asdict(content) | {"ids": base64.b64encode(content.ids.tobytes()).decode()}
            _write(path, json.dumps(fields).encode())

    def write_record(self, entry: Entry) -> None:
        """Write whose a context is and how it is used, after its content."""
        assert entry.content is not None, "an expired context is not written"
        record = {name: getattr(entry, name) for name in _SAVED_FIELDS} | {
            "id": entry.id,
            "tenant": entry.scope.tenant,
            "salt": entry.scope.salt,
            "key": entry.key.hex(),
            "content": _digest(self._path(entry.id, _CONTENT)),
        }
        text = json.dumps(record, sort_keys=True)
        sealed = {"record": text, "seal": self.keys.seal("record", text.encode()).hex()}
        _write(self._path(entry.id, _RECORD), json.dumps(sealed).encode())

    def remove_keys(self, entry: Entry) -> None:
        """Remove a context's keys and values; it stays as a cold one."""
        _remove(self._path(entry.id, _KEYS))

    def remove(self, entry: Entry) -> None:
        """Remove all of a context."""
        for suffix in (_RECORD, _KEYS, _CONTENT):
            _remove(self._path(entry.id, suffix))

    def set_aside(self, entry: Entry) -> None:
        """Move a context's keys and values aside, because they cannot be read."""
        self._move_aside(self.path_of(entry), "it cannot be read as this context")

    def rescan(self) -> list[Entry]:
        """Return the contexts that are there, and clear away what an earlier end left half done.

        Damaged and foreign files are moved to the folder `aside`.
        """
        entries = []
        for record in sorted(self._own.glob(f"*{_RECORD}")):
            entry = self._read(record)
            if entry is not None:
                entries.append(entry)
        known = {entry.id for entry in entries}
        for path in sorted(self._own.iterdir()):
            if path.name.startswith("."):
                # Begun by a server that was killed.
                _remove_quietly(path)
            elif path.suffix not in (_RECORD, _CONTENT, _KEYS) or _is_odd_folder(path):
                self._move_aside(path, "this store did not write it")
            elif path.stem not in known:
                # Written before its record, or removed after it.
                _remove_quietly(path)
        return entries

    def close(self) -> None:
        """Let another server use the folder."""
        os.close(self._lock)

    def _path(self, id: str, suffix: str) -> Path:
        return self._own / f"{id}{suffix}"

    def _read_secret(self) -> bytes:
        path = self._folder / _SECRET
        if not path.exists():
            _write(path, secrets.token_hex(_SECRET_BYTES).encode())
        try:
            secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except ValueError:
            secret = b""
        if len(secret) != _SECRET_BYTES:
            raise InvalidInputError(
                f"{path} holds no secret of {_SECRET_BYTES} bytes in hexadecimal; put it back from"
                " a copy, or remove the store, whose contexts cannot be told from others without it"
            )
        return secret

    def _read(self, path: Path) -> Entry | None:
        """Return the context of a record; None after moving it aside."""
        try:
            return self._entry(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, _ForeignError) else "it is damaged"
            for suffix in (_RECORD, _CONTENT, _KEYS):
                self._move_aside(path.with_suffix(suffix), reason)
            return None

    def _entry(self, path: Path) -> Entry:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        text = sealed["record"]
        if sealed["seal"] != self.keys.seal("record", text.encode()).hex():
            raise _ForeignError("another server wrote it, or it was modified")
        record = json.loads(text)
        if record["id"] != path.stem:
            raise _ForeignError("it has another name than when it was written")
        data = self._path(record["id"], _CONTENT).read_bytes()
        if hashlib.sha256(data).hexdigest() != record["content"]:
            raise _ForeignError("its content was modified")
        fields = json.loads(data)
        ids = as_ids(np.frombuffer(base64.b64decode(fields["ids"]), dtype=np.int32))
        literal = tuple((low, high) for low, high in fields["literal"])
        content = Content(**fields | {"ids": ids, "literal": literal})
        scope = Scope(tenant=record["tenant"], salt=record["salt"])
        key = self.keys.key(scope, ids)
        if key.hex() != record["key"]:
            raise _ForeignError("another model encoded it")
        return Entry(
            id=record["id"],
            key=key,
            scope=scope,
            content=content,
            tokens=len(content),
            status=Status.READY,
            has_file=self._path(record["id"], _KEYS).exists(),
            **{name: record[name] for name in _SAVED_FIELDS},
        )

    def _move_aside(self, path: Path, reason: str) -> None:
        if not path.exists() and not path.is_symlink():
            return
        target = self._folder / _ASIDE / f"{secrets.token_hex(4)}-{path.name}"
        with contextlib.suppress(OSError):
            os.replace(path, target)
            self.moved_aside += 1
            _log.warning("%s was moved to %s: %s", path.name, target, reason)


class _ForeignError(ValueError):
    """A file that this server did not write; its message says how that shows."""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file for this user alone, all of it or nothing."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _remove(path: Path) -> None:
    """Remove a file, or a folder that several ranks wrote; it may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        _remove(path)


def _is_odd_folder(path: Path) -> bool:
    """True for a folder that is none of keys and values."""
    return path.is_dir() and path.suffix != _KEYS


def _locked(path: Path) -> int:
    """Return an open file that no other process can lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        import fcntl
    except ImportError:
        # Not on Windows.
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise InvalidInputError(
            f"the store {quote_path(path.parent)} is used by another server; give each server a"
            " folder of its own"
        ) from None
    return descriptor
