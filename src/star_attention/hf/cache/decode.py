"""The cache of phase 2: a context that is only read, and a tail that grows with every token.

Axes: B batch rows, G KV heads, S new tokens, T tail tokens, L context tokens, K keys, Q queries,
H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.blocks import KV, shard_attention, tail_attention
from star_attention.attention.latent import compressed_shard_attention, compressed_tail_attention
from star_attention.attention.state import State, empty_state, merge
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import (
    ForwardPosition,
    StarCache,
    StarLayer,
    build_layers,
    by_token,
)
from star_attention.hf.cache.latent import Latents
from star_attention.planning.segments import Segments
from star_attention.storage.host.feed import feeds_of
from star_attention.storage.kv import ContextKV, KVFormat, LayerKV, VisibleRange
from star_attention.storage.tail import Tail


@dataclass(kw_only=True)
class AnswerPosition(ForwardPosition):
    """The end of the context and of its tail, with the request's padding and ranks.

    Attributes:
        context_tokens: tokens of the whole context.
        padding: left padding of each query, in tokens.
        visible: the part of the context that queries see, None for all of it.
        by_heads: True if each rank computes queries, keys and values of its own heads alone.
        latents: of each layer the attention that need not expand what it stores; None for others.
        tail: the first layer's tail, for its length.
    """

    context_tokens: int
    padding: list[int]
    visible: VisibleRange | None
    comm: Comm
    by_heads: bool = False
    latents: Latents | None = None
    tail: Tail = field(default_factory=Tail)

    @property
    def seen_tokens(self) -> int:
        return self.context_tokens + self.tail.length

    def row_padding(self, rows: int) -> list[int]:
        """Return the padding of each batch row; beams and several answers repeat a query's row."""
        repeats = rows // len(self.padding)
        return [pad for pad in self.padding for _ in range(repeats)]


class AnswerLayer(StarLayer[AnswerPosition]):
    """A layer's shard of the context, which all batch rows share, and the tail of each row."""

    def __init__(
        self, index: int, window: int | None, position: AnswerPosition, stores: list[LayerKV]
    ) -> None:
        super().__init__(index, window, position, stores)
        (self.shard,) = stores
        self.tail = position.tail if index == 0 else Tail()
        self._latent = None if position.latents is None else position.latents[index]
        self._is_compressed = False

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        if self.position.by_heads:
            # Those of the other heads come with their queries, in `attend`.
            return k_BGSD, v_BGSD
        self.tail.append(k_BGSD, v_BGSD)
        latent = self._latent
        self._is_compressed = latent is not None and k_BGSD.shape[2] <= latent.most_queries
        if self._is_compressed:
            # The model expands what is returned, of which nothing is used.
            return k_BGSD[:, :, :1], v_BGSD[:, :, :1]
        k_BGTD, v_BGTD = self.tail.pair()
        if not self.shard.expands or not self.shard.tokens:
            return k_BGTD, v_BGTD
        batch = k_BGTD.shape[0]
        k_1GLD, v_1GLD = self.shard.pair()
        k_BGLD, v_BGLD = (t.expand(batch, -1, -1, -1) for t in (k_1GLD, v_1GLD))
        return torch.cat([k_BGLD, k_BGTD], 2), torch.cat([v_BGLD, v_BGTD], 2)

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        """Attend to this rank's shard, on the last rank also to the tail; merge over all ranks.

        With weights in slices, `q_BQHD`, `k_BKGD` and `v_BKGD` are of this rank's heads, and so is
        the result; in between are all heads.
        """
        if self._is_compressed:
            return self._attend_compressed(q_BQHD, rule)
        comm, heads = self.position.comm, None
        if self.position.by_heads:
            heads = own_heads(comm, q_BQHD)
            q_BQHD, *pair = comm.gather_heads(q_BQHD, k_BKGD, v_BKGD)
            self.tail.append(*(t.transpose(1, 2) for t in pair))
            k_BKGD, v_BKGD = by_token(self.tail.pair())
        B, Q, H, _ = q_BQHD.shape
        padding = self.position.row_padding(B)
        segments, tail = self.split(k_BKGD, v_BKGD)
        states = self._attend_to_shard(q_BQHD, segments, rule, padding)
        if comm.cp_rank == comm.cp_size - 1:
            near = recent_rule(rule, self.position.visible)
            states.append(tail_attention(q_BQHD, *tail, rule=near, padding=padding))
        state = (
            merge(states, dtype=rule.dtype)
            if states
            else empty_state(B, Q, H, v_BKGD.shape[3], q_BQHD.device)
        )
        return state if comm.cp_size == 1 else comm.merge(state, heads)

    def _attend_compressed(self, q_BQHD: Tensor, rule: Rule) -> State:
        """Do as `attend` does, to compressed keys and values."""
        assert self._latent is not None
        comm, expansion = self.position.comm, self._latent.expansion()
        q_BQHE = expansion.absorb(q_BQHD)
        B, Q, H, _ = q_BQHE.shape
        padding = self.position.row_padding(B)
        states, first_query, visible = [], self.first_query(Q), self.position.visible
        for start, segment in self._compressed_segments():
            states.append(
                compressed_shard_attention(
                    q_BQHE,
                    segment,
                    rule=segment_rule(rule, visible, start),
                    offsets=[first_query - pad - start for pad in padding],
                )
            )
        if comm.cp_rank == comm.cp_size - 1:
            tail = by_token(self.tail.pair())
            near = recent_rule(rule, visible)
            states.append(compressed_tail_attention(q_BQHE, *tail, rule=near, padding=padding))
        if not states:
            states = [empty_state(B, Q, H, self._latent.compressed_size, q_BQHE.device)]
        # Expanded before ranks merge: values are smaller than what they are made of.
        state = expansion.expand(merge(states), rule.dtype)
        return state if comm.cp_size == 1 else comm.merge(state)

    def _compressed_segments(self) -> Iterator[tuple[int, KV]]:
        """Yield the first token of each segment of the shard, and what is stored of it."""
        if not self.shard.tokens:
            return
        c_1KGC, r_1KGR = by_token(self.shard.pair())
        at = 0
        for start, stop in self.shard.segments:
            part = slice(at, at + stop - start)
            yield start, (c_1KGC[:, part], r_1KGR[:, part])
            at = part.stop

    def split(self, k_BKGD: Tensor, v_BKGD: Tensor) -> tuple[list[KV], KV]:
        """Return keys and values of each segment of the shard, and those of the tail.

        Args:
            k_BKGD: keys that `append` returned, or their expansion (MLA).
            v_BKGD: values, likewise.
        """
        shard_tokens = self.shard.tokens
        if shard_tokens and not self.shard.expands:
            k_1KGD, v_1KGD = by_token(self.shard.pair())
        else:
            # Keys that the model expanded: the shard's come before the tail's.
            k_1KGD, v_1KGD = k_BKGD[:, :shard_tokens], v_BKGD[:, :shard_tokens]
            k_BKGD, v_BKGD = k_BKGD[:, shard_tokens:], v_BKGD[:, shard_tokens:]
        tail = k_BKGD, v_BKGD
        if len(self.shard.segments) == 1:
            return [(k_1KGD, v_1KGD)], tail
        lengths = [stop - start for start, stop in self.shard.segments]
        keys, values = k_1KGD.split(lengths, 1), v_1KGD.split(lengths, 1)
        return list(zip(keys, values, strict=True)), tail

    def first_query(self, queries: int) -> int:
        """Return the position of the first of the last `queries` tokens."""
        return self.position.context_tokens + self.tail.length - queries

    def _attend_to_shard(
        self, q_BQHD: Tensor, segments: list[KV], rule: Rule, padding: list[int]
    ) -> list[State]:
        """Return a state for each segment of the shard."""
        first_query = self.first_query(q_BQHD.shape[1])
        return [
            shard_attention(
                q_BQHD,
                segment,
                rule=segment_rule(rule, self.position.visible, start),
                offsets=[first_query - pad - start for pad in padding],
            )
            for (start, _), segment in zip(self.shard.segments, segments, strict=True)
        ]

    # Beam search, several answers and assisted decoding change rows, which differ only in the tail.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.tail.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tail.length:
            rows = self.tail.pair()[0].shape[0]
            self.tail.select(torch.arange(rows, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.tail.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        # A layer that reads another layer's keys has no tail.
        if not self.tail.length:
            return
        # transformers 5.17 passes the length to keep, or a negative number of tokens to remove;
        # later releases only the latter.
        if tokens_to_remove > 0:
            tokens_to_remove -= self.position.context_tokens + self.tail.length
        self.tail.crop(-tokens_to_remove)


def recent_rule(rule: Rule, visible: VisibleRange | None) -> Rule:
    """Limit a layer's rule to the most recent keys, where only these are visible."""
    if visible is None:
        return rule
    return replace(rule, window=min(visible.recent, rule.window or visible.recent))


def segment_rule(rule: Rule, visible: VisibleRange | None, start: int) -> Rule:
    """Return a layer's rule for the segment of a shard that starts at a position."""
    return rule if visible is None or start < visible.first else recent_rule(rule, visible)


def own_heads(comm: Comm, q_BQHD: Tensor) -> slice:
    """Return which of all query heads a rank's own queries are."""
    heads = q_BQHD.shape[2]
    return slice(comm.cp_rank * heads, (comm.cp_rank + 1) * heads)


class AnswerCache(StarCache):
    """The cache of phase 2: a frozen shard that every batch row shares, and a tail for each row.

    Args:
        shard: this rank's keys and values of the context.
        windows: sliding window of each layer in tokens, None for full attention.
        context_tokens: tokens of the whole context.
        padding: left padding of each query of the batch, in tokens.
        comm: merges the attention of all ranks.
        slices: slices of the weights that forwards multiply, None for all of them.
        latents: of each layer the attention that need not expand what it stores; None for others.
    """

    layers: list[AnswerLayer]
    position: AnswerPosition

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
        position = AnswerPosition(
            context_tokens=context_tokens,
            padding=padding,
            visible=shard.visible,
            comm=comm,
            by_heads=slices is not None and slices.by_heads,
            latents=latents,
        )
        super().__init__(build_layers(AnswerLayer, windows, position, [shard]), position, comm)
        self.slices = slices
        self.feeds = feeds_of(shard)
        """What brings layers from host memory, as long as it is kept."""

    def begin(self, ids_BS: Tensor, positions_BS: Tensor, logits_to_keep: int) -> None:
        """Report this rank's progress, which other ranks name if it fails."""
        self.comm.tick(f"phase 2, {self.tail_tokens:,} tokens after the context")

    @property
    def context_tokens(self) -> int:
        """Tokens of the whole context."""
        return self.position.context_tokens

    def kept_with(self, window: int | None) -> Segments:
        """Return the tokens of the shard that layers with a window keep; None for full attention.

        All of them keep the same.
        """
        return next(layer.shard.segments for layer in self.layers if layer.window == window)

    @property
    def kv_format(self) -> KVFormat:
        """The format of the stored context."""
        return self.layers[0].shard.kv_format

    @property
    def tails(self) -> list[Tail]:
        """The tail of each layer."""
        return [layer.tail for layer in self.layers]

    @property
    def tail_tokens(self) -> int:
        """Tokens after the context, with padding."""
        return self.position.tail.length

    def row_padding(self, rows: int) -> list[int]:
        """Return the padding of each of `rows` batch rows, in tokens."""
        return self.position.row_padding(rows)
