"""`Identities`: what contexts of a loaded model depend on, computed again where it changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from star_attention.hf.loading import fingerprint, identity, tensor_parallel
from star_attention.storage.context import EncodedContext
from star_attention.storage.transfers import Beside


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

    def check(self, context: EncodedContext, tokenizer: Any) -> None:
        """Raise `ContextMismatchError` unless this model, as it is, could have encoded a context.

        Args:
            context: the context.
            tokenizer: the tokenizer of its queries, or None.
        """
        if self._encoded(context) and context.model_state == identity.state(self._outer):
            current: dict[str, Any] = {"tokenizer": self.of_tokenizer(tokenizer)}
        else:
            current = self.of(tokenizer)
        identity.check("the context", context.identity, current)

    def later_check(
        self, context: EncodedContext, tokenizer: Any, device: torch.device
    ) -> Callable[[], None] | None:
        """Return what makes the same check once a forward on the context has been issued.

        Its look at weights does not wait for the device. None where the check was made here: of
        another model's context, which a forward may not even be able to read.
        """
        if not self._encoded(context):
            self.check(context, tokenizer)
            return None
        beside = Beside(device)

        def check() -> None:
            with beside.running():
                self.check(context, tokenizer)

        return check

    def _encoded(self, context: EncodedContext) -> bool:
        """True for a context of this model, which may have changed since."""
        return context.model is not None and context.model() is self._model

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
