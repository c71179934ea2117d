"""Contexts for a store, made by an engine between the steps of its batch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from star_attention import methods
from star_attention.engine import StarLLM
from star_attention.errors import CorruptContextError, quote_path
from star_attention.generation.batching.batch import Batch
from star_attention.generation.batching.encoding import Encoding
from star_attention.serve.contexts.keys import TokenIds, identity_digest
from star_attention.storage.context import EncodedContext, read_layer
from star_attention.storage.parked import ParkedContext, Parking, host_bytes

_PLACES = ("kv_device", "kv_resident", "balance_ranks")
"""Settings that say where contexts are or are computed, not what they are."""


def engine_identity(star: StarLLM) -> bytes:
    """Return a digest of what an engine's contexts depend on: model, tokenizer and settings."""
    settings = {name: value for name, value in asdict(star.config).items() if name not in _PLACES}
    return identity_digest({"settings": settings, **star.runtime.identity})


class BatchEncoder:
    """Encodes a store's contexts between the decode steps of a batch.

    Args:
        star: the engine.
        batch: returns the batch whose steps the engine's thread takes.
    """

    def __init__(self, star: StarLLM, batch: Callable[[], Batch]) -> None:
        self._star, self._batch = star, batch

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of a context's keys and values, before it is encoded.

        On several ranks, those of the rank that has most of them.
        """
        runtime = self._star.runtime
        plan = runtime.plan_for(tokens)
        return max(methods.rank_bytes(runtime.method, runtime.config, plan, runtime.handle))

    def block_size(self, tokens: int) -> int:
        """Return the tokens of a block of a context of that length."""
        return self._star.runtime.plan_for(tokens).block_size

    def start(self, ids: TokenIds, reuse: EncodedContext | None) -> BatchJob:
        """Begin to encode; blocks that the context `reuse`, if any, shares are copied."""
        if reuse is not None and not self._can_reuse(reuse, len(ids)):
            reuse = None
        ids_L = torch.from_numpy(ids.astype("int64"))
        return BatchJob(self._batch().encode(ids_L, progress=False, reuse=reuse), len(ids))

    def _can_reuse(self, old: EncodedContext, tokens: int) -> bool:
        runtime = self._star.runtime
        plan = runtime.plan_for(tokens)
        # Sizes of the old context would become the new one's, which would depend on what is kept.
        same = old.plan.block_size == plan.block_size and old.plan.anchor_size == plan.anchor_size
        return same and runtime.method.why_not_reuse() is None

    def load(self, path: Path, ids: TokenIds) -> LoadJob:
        """Begin to read and verify a saved context.

        Raises:
            ContextFileError: the file cannot be used, or holds other tokens.
        """
        context = self._star.load_context(path)
        if context.token_ids.tolist() != ids.tolist():
            raise CorruptContextError(
                f"{quote_path(path)} holds {len(context):,} other tokens than the {len(ids):,} of"
                " its record; encode the context again"
            )
        return LoadJob(context)

    def host_bytes(self, context: EncodedContext) -> int:
        """Return the bytes that a context takes in host memory."""
        layers = [layer for layer in context.kv.layers if not layer.is_empty]
        return sum(host_bytes(tensor) for layer in layers for tensor in layer.stored())

    def park(self, context: EncodedContext) -> Parking:
        """Begin to copy a context to host memory."""
        return Parking(context)

    def bring_back(self, parked: ParkedContext) -> LoadJob:
        """Begin to copy a context back from host memory."""
        return LoadJob(parked.back())

    def free_memory(self) -> None:
        """Give memory back that nothing refers to."""
        gc.collect()
        if self._star.device.type == "cuda":
            torch.cuda.empty_cache()


class BatchJob:
    """An encode that the batch's steps advance."""

    def __init__(self, encoding: Encoding, tokens: int) -> None:
        self._encoding, self._tokens = encoding, tokens

    @property
    def done(self) -> bool:
        """True once there is a context, or an error."""
        return self._encoding.done

    @property
    def tokens(self) -> int:
        """Tokens encoded so far."""
        return round(self._encoding.progress * self._tokens)

    def advance(self) -> None:
        """Do nothing: the batch's steps do."""

    def result(self) -> EncodedContext:
        """Return the context, or raise why there is none."""
        return self._encoding.result()

    def cancel(self) -> None:
        """Stop, and free what was encoded."""
        self._encoding.cancel()


class LoadJob:
    """A saved context that is read and verified, or one that comes from host memory, by layers.

    Layers are read when they are first used: damage would show in the middle of an answer, and the
    first answer would wait for all of them at once, with everybody else's.

    Args:
        context: the context, as `StarLLM.load_context` or `ParkedContext.back` returns it.
    """

    def __init__(self, context: EncodedContext) -> None:
        self._context = context
        layers = enumerate(context.kv.layers)
        self._layers = [index for index, layer in layers if not layer.is_empty]
        self._read = 0
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        """True once all layers are read, or one cannot be."""
        return self._error is not None or self._read == len(self._layers)

    @property
    def tokens(self) -> int:
        """Tokens so far, as if they came one after another."""
        return len(self._context) * self._read // max(1, len(self._layers))

    def advance(self) -> None:
        """Read a layer."""
        try:
            read_layer(self._context, self._layers[self._read])
        except Exception as error:
            self._error = error
        self._read += self._error is None

    def result(self) -> EncodedContext:
        """Return the context, or raise why it cannot be read."""
        if self._error is not None:
            raise self._error
        return self._context

    def cancel(self) -> None:
        """Leave the rest unread."""
