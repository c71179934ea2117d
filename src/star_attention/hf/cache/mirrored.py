"""The cache of phase 2 on several ranks: all ranks do the same to their own caches.

Rank 0 runs transformers' generation over a `MirroredCache`, which broadcasts each forward and each
change of the batch's rows. The other ranks pass what they receive to a `Mirror`, which runs it on
their shard.

Axes: B batch rows, S new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_attention.distributed.comm import Comm
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.latent import Latents
from star_attention.storage.kv import ContextKV

NEW, FORWARD, SELECT, REPEAT, CROP = "cache", "forward", "select", "repeat", "crop"
"""Operations, the first item of each broadcast message."""


class MirroredCache(AnswerCache):
    """Rank 0's cache: broadcasts each operation before it runs here."""

    def __init__(
        self,
        shard: ContextKV,
        windows: list[int | None],
        context_tokens: int,
        padding: list[int],
        comm: Comm,
        slices: Any = None,
        latents: Latents | None = None,
    ) -> None:
        super().__init__(shard, windows, context_tokens, padding, comm, slices, latents)
        comm.broadcast_object((NEW, padding, () if slices is None else slices.parts))

    def begin(self, ids_BS: Tensor, positions_BS: Tensor, logits_to_keep: int) -> None:
        message = (FORWARD, ids_BS.tolist(), positions_BS.tolist(), logits_to_keep)
        self.comm.broadcast_object(message)
        super().begin(ids_BS, positions_BS, logits_to_keep)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.comm.broadcast_object((SELECT, beam_idx.tolist()))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.comm.broadcast_object((REPEAT, repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.comm.broadcast_object((SELECT, indices.tolist()))
        super().batch_select_indices(indices)

    def crop(self, tokens: int) -> None:
        self.comm.broadcast_object((CROP, tokens))
        super().crop(tokens)


class Mirror:
    """The counterpart of `MirroredCache` on every other rank.

    Args:
        new_cache: makes this rank's cache for queries of a given padding, with weights in slices
            in the given parts of the model.
        forward: runs a forward, as `forward(cache, ids_BS, positions_BS, logits_to_keep)`; tensors
            are on the CPU.
    """

    def __init__(
        self,
        new_cache: Callable[[list[int], tuple[str, ...]], AnswerCache],
        forward: Callable[[AnswerCache, Tensor, Tensor, int], None],
    ) -> None:
        self._new_cache = new_cache
        self._forward = forward
        self._cache: AnswerCache | None = None

    def run(self, operation: str, *arguments: Any) -> None:
        """Run one operation that rank 0 has broadcast."""
        if operation == NEW:
            self._cache = self._new_cache(*arguments)
            return
        cache = self._cache
        assert cache is not None, f"{operation} before rank 0 has made a cache"
        if operation == FORWARD:
            ids_BS, positions_BS = (torch.tensor(rows, device="cpu") for rows in arguments[:2])
            self._forward(cache, ids_BS, positions_BS, arguments[2])
        elif operation == SELECT:
            cache.batch_select_indices(torch.tensor(arguments[0], device="cpu"))
        elif operation == REPEAT:
            cache.batch_repeat_interleave(arguments[0])
        else:
            assert operation == CROP, f"unknown operation {operation!r}"
            cache.crop(arguments[0])
