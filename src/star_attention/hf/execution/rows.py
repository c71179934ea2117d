"""Decode forwards of many rows: one new token of each, whatever context it belongs to.

Axes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from star_attention.distributed.comm import Comm
from star_attention.hf.cache.rows import RowKV, RowsCache, RowSet
from star_attention.hf.execution import slices
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.execution.request import follow_forward, latents_of
from star_attention.storage.kv import ContextKV

__all__ = ["RowForwards", "RowKV", "RowSet", "kind_of"]


def kind_of(handle: ModelHandle, shard: ContextKV, rope_length: int | None) -> Hashable | None:
    """Return what rows must have in common to share forwards; None for rows that run alone.

    Args:
        handle: the model.
        shard: keys and values of a row's context, after its first forward.
        rope_length: tokens that length-dependent rotary frequencies are computed for, or None.
    """
    latents = latents_of(handle, shard)
    if latents is not None:
        expanding = zip(shard.layers, latents, strict=True)
        if any(layer.expands and latent is None for layer, latent in expanding):
            # Keys and values are expanded by the model, each row's in one piece.
            return None
    # Of rows in another format, or that see a part of their context, a graph can read none.
    return rope_length, shard.kv_format, shard.visible is None, len(shard.segments) == 1


class RowForwards:
    """Runs the decode forwards of one model's rows.

    Args:
        handle: the model.
        comm: the ranks, each with its shard of every context.
    """

    def __init__(self, handle: ModelHandle, comm: Comm) -> None:
        self._handle, self._comm = handle, comm
        self._cache: RowsCache | None = None
        # On several ranks: whether all of them have a graph for the rows.
        self._agreed: bool | None = None
        self.by_graph = False
        """True if the next forward may read queries, too: a CUDA graph has run the last one."""

    @torch.no_grad()
    def run(
        self,
        rows: RowSet,
        tokens_R: Tensor,
        rope_length: int | None,
        sliced: tuple[str, ...] = (),
    ) -> Tensor | None:
        """Run a forward of each row's newest token, which joins its tail. Collective.

        Args:
            rows: the rows, all of one kind.
            tokens_R: their tokens, int64, on the model's device.
            rope_length: that of the rows.
            sliced: parts of the model whose weights ranks multiply in slices, for all rows.

        Returns:
            Logits of the tokens that follow, fp32 `[R, V]`; None on ranks other than 0.
        """
        logits_RV = self._of_graph(rows, tokens_R, sliced=sliced)
        # Ranks read queries in forwards of their own.
        self.by_graph = logits_RV is not None and self._comm.size == 1
        if logits_RV is not None:
            return logits_RV if self._comm.rank == 0 else None
        if self._cache is None or self._cache.position.rows is not rows:
            own = slices.of(self._handle, sliced, self._comm)
            latents = latents_of(self._handle, rows.rows[0].shard)
            self._cache = RowsCache(rows, self._handle.windows, self._comm, own, latents)
        return self._eager(self._cache, tokens_R, rope_length)

    @torch.no_grad()
    def run_with_queries(self, rows: RowSet, tokens_R: Tensor, wanted: list[int]) -> Tensor | None:
        """Run a forward of rows' newest tokens and of queries, whose tokens share a tail each.

        Args:
            rows: the rows, all of one kind, as `RowKV.of_next` makes those of a query.
            tokens_R: their tokens, int64, on the model's device.
            wanted: rows whose logits are wanted.

        Returns:
            Logits of the tokens that follow these rows, fp32. None without a CUDA graph for them:
            nothing has happened then.
        """
        return self._of_graph(rows, tokens_R, wanted)

    def _of_graph(
        self,
        rows: RowSet,
        tokens_R: Tensor,
        wanted: list[int] | None = None,
        sliced: tuple[str, ...] = (),
    ) -> Tensor | None:
        graphs = self._handle.graphs
        agreed = self._agree(rows, sliced)
        if graphs is None or not agreed:
            return None
        logits_RV: Tensor | None = graphs.of_rows.run(rows, tokens_R, self._comm, wanted, sliced)
        if logits_RV is not None:
            # It may have moved tails that the eager cache holds.
            self.forget()
        return logits_RV

    def _agree(self, rows: RowSet, sliced: tuple[str, ...]) -> bool:
        """Return True if all ranks run the forwards of these rows by a CUDA graph. Collective."""
        graphs, comm = self._handle.graphs, self._comm
        if comm.size == 1:
            return graphs is not None
        if self._agreed is None:
            can_run = (
                graphs is not None
                and graphs.runs_on(comm)
                and graphs.of_rows.can_run(rows, comm, sliced)
            )
            self._agreed = all(comm.gather(can_run))
        return self._agreed

    def renew(self) -> None:
        """Let ranks agree anew on how forwards run: with new rows, or after a fault."""
        self._agreed = None

    def _eager(self, cache: RowsCache, tokens_R: Tensor, rope_length: int | None) -> Tensor | None:
        positions = [row.position for row in cache.position.rows.rows]
        positions_R = torch.tensor(positions, device=tokens_R.device)
        inputs = tokens_R[:, None], positions_R[:, None], cache, rope_length
        if self._comm.rank:
            follow_forward(self._handle, *inputs)
            return None
        return self._handle.logits(*inputs)[:, -1].float()

    def forget(self) -> None:
        """Drop what belongs to the rows of the last forward."""
        self._cache = None
