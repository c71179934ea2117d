"""`Identities`: what contexts of a loaded model depend on, computed again where it changed."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from star_attention.hf.loading import fingerprint, identity, tensor_parallel


class Identities:
    """What contexts of one model depend on, kept as long as nothing shows a sign of a change.

    Args:
        model: the transformers model.
        outer: the PEFT model around it, or `model` itself.
    """

    def __init__(self, model: nn.Module, outer: nn.Module) -> None:
        self._model, self._outer = model, outer
        self._of_model: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._of_tokenizer: tuple[tuple[Any, ...], str | None] | None = None
        self._checksum_s = 0.0
        self._shard_checksum: str | None = None

    def of(self, tokenizer: Any, *, within_s: float = 0.0) -> dict[str, Any]:
        """Return the fields that an encoded context depends on: model, precision and tokenizer.

        Args:
            tokenizer: the tokenizer, or None.
            within_s: read all weights again if that takes no longer, not only those that show signs
                of a change (`fingerprint`).
        """
        state = identity.state(self._outer)
        fresh = 0.0 < self._checksum_s <= within_s
        if self._of_model is None or self._of_model[0] != state or fresh:
            self._of_model = (state, self._compute(fresh=fresh))
        return self._of_model[1] | {"tokenizer": self.of_tokenizer(tokenizer)}

    def of_tokenizer(self, tokenizer: Any) -> str | None:
        """Return the identity of a tokenizer, None without one."""
        if tokenizer is None:
            return None
        state = fingerprint.tokenizer(tokenizer)
        if self._of_tokenizer is None or self._of_tokenizer[0] != state:
            self._of_tokenizer = (state, identity.tokenizer_identity(tokenizer))
        return self._of_tokenizer[1]

    def _compute(self, *, fresh: bool) -> dict[str, Any]:
        started = time.perf_counter()
        shard = tensor_parallel.model_shard(self._model)
        if shard is None:
            fields = identity.model_identity(self._model, self._outer, fresh=fresh)
            if fresh or not self._checksum_s:
                self._checksum_s = time.perf_counter() - started
            return fields
        # The whole model's, as long as this rank's shard is as it was at the start.
        checksum = identity.weights_checksum(self._model, fresh=fresh)
        self._shard_checksum = self._shard_checksum or checksum
        if checksum == self._shard_checksum:
            return shard.identity
        return shard.identity | {"weights": checksum, "checksum": checksum}
