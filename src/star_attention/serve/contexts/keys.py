"""Content addresses: what makes two contexts the same, in memory and on disk."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from star_attention.errors import InvalidInputError, quote

TokenIds = np.ndarray[Any, np.dtype[np.int32]]
"""Token ids, int32 `[tokens]`."""

LONGEST_SALT = 1024
_ID_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Who may find a context: contexts of different scopes never meet.

    Attributes:
        tenant: the name of the key that a request came with.
        salt: what a request adds to set its contexts apart (`cache_salt`); "" for nothing.

    Raises:
        InvalidInputError: the salt is too long.
    """

    tenant: str
    salt: str = ""

    def __post_init__(self) -> None:
        if len(self.salt) > LONGEST_SALT:
            raise InvalidInputError(
                f"cache_salt {quote(self.salt)} has {len(self.salt):,} characters; give at most"
                f" {LONGEST_SALT:,}"
            )


def new_id() -> str:
    """Return a new context's id, which cannot be guessed."""
    return f"ctx_{secrets.token_hex(_ID_BYTES)}"


def as_ids(ids: Any) -> TokenIds:
    """Return token ids as a read-only array of its own."""
    array = np.array(ids, dtype=np.int32).reshape(-1)
    array.flags.writeable = False
    return array


def identity_digest(identity: dict[str, Any]) -> bytes:
    """Return a digest of everything that the keys and values of an engine depend on.

    Args:
        identity: JSON values by field: model, tokenizer, adapters, method, sizes, precision.
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).digest()


class KeyMaker:
    """Makes keys: one function for memory and files.

    Args:
        secret: known to this server alone, so that nobody else can make a key, or tell from one
            what it stands for.
        identity: digest of the engine (`identity_digest`).
    """

    def __init__(self, secret: bytes, identity: bytes) -> None:
        self.identity = identity
        self._secret = secret

    def key(self, scope: Scope, ids: TokenIds) -> bytes:
        """Return the key of a context of these tokens in a scope."""
        # JSON can hold half a character.
        salt = scope.salt.encode(errors="surrogatepass")
        fields = (scope.tenant.encode(), salt, self.identity, ids.tobytes())
        return self.seal("context", *fields)

    def seal(self, purpose: str, *fields: bytes) -> bytes:
        """Return the HMAC-SHA256 of fields, none of which can run into the next."""
        mac = hmac.new(self._secret, digestmod=hashlib.sha256)
        for field in (purpose.encode(), *fields):
            mac.update(len(field).to_bytes(8, "little"))
            mac.update(field)
        return mac.digest()
