"""Keys of clients: who may use the server, and whose contexts are whose."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from star_attention.errors import InvalidInputError, first_line, quote

OPEN = "local"
"""The tenant of everybody, where a server has no keys."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


class Keys:
    """Names of tenants by their keys, of which only digests are held.

    Args:
        digests: SHA-256 of each key, with the tenant's name; several keys may have one name.
    """

    def __init__(self, digests: list[tuple[bytes, str]]) -> None:
        self._digests = digests

    @classmethod
    def read(cls, path: str) -> Keys:
        """Read a file with a key per line: `name:key`, or `name:sha256:HEX`; `#` begins a comment.

        Raises:
            InvalidInputError: a file that cannot be read, or a line that is not a key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"the key file {path} cannot be read: {first_line(error)}; give one with lines"
                " of name:key"
            ) from None
        digests: list[tuple[bytes, str]] = []
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, colon, key = line.partition(":")
            # The line itself is secret.
            if not colon or not _NAME.fullmatch(name) or not key.strip():
                raise InvalidInputError(
                    f"{path}, line {number}: expected name:key, with a name of up to 64 letters,"
                    " digits, dots, dashes and underscores"
                )
            key = key.strip()
            hashed = _DIGEST.fullmatch(key)
            digest = bytes.fromhex(hashed[1]) if hashed else _digest(key)
            digests.append((digest, name))
        if not digests:
            raise InvalidInputError(
                f"the key file {quote(path)} has no keys; write lines of name:key"
            )
        return cls(digests)

    @classmethod
    def of(cls, tenants: dict[str, str]) -> Keys:
        """Return keys with the names of their tenants."""
        return cls([(_digest(key), tenant) for key, tenant in tenants.items()])

    @property
    def tenants(self) -> set[str]:
        """Return the names of all tenants."""
        return {name for _, name in self._digests}

    def tenant(self, key: str) -> str | None:
        """Return the name that a key belongs to; None for no key of this server."""
        given, found = _digest(key), None
        # All are compared, so that the time says nothing.
        for digest, name in self._digests:
            if hmac.compare_digest(digest, given):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
