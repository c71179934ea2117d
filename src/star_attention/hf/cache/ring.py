"""The cache of ring attention's phase 1: exact attention over tokens that are sharded over ranks.

Each rank has the queries of its own tokens. Keys and values pass around the ring of ranks, and each
rank attends to the shard that it has while the next one is on its way.

Axes: B contexts, S this rank's tokens, K keys, Q queries, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.state import State, empty_state, merge
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import ForwardPosition, StarCache, StarLayer, build_layers
from star_attention.hf.cache.encode import write_kept
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV


@dataclass(kw_only=True)
class RingPosition(ForwardPosition):
    """The one forward of ring attention: the segments of every rank, and how to exchange them."""

    layout: tuple[Segments, ...]
    comm: Comm


class RingLayer(StarLayer[RingPosition]):
    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        own = self.position.layout[self.position.comm.cp_rank]
        for start, stop in own:
            at = own.offset(start)
            part = slice(at, at + stop - start)
            write_kept(self.stores, start, k_BGSD[:, :, part], v_BGSD[:, :, part])
        return k_BGSD, v_BGSD

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        layout, comm = self.position.layout, self.position.comm
        B, _, G, k_size = k_BKGD.shape
        v_heads, v_size = v_BKGD.shape[2:]
        elements_per_token = B * (G * k_size + v_heads * v_size)
        own, owner = layout[comm.cp_rank], comm.cp_rank
        total = elements_per_token * sum(segments.tokens for segments in layout)
        packed = torch.cat([k_BKGD.reshape(-1), v_BKGD.reshape(-1)])
        states: list[list[State]] = [[] for _ in own]
        for step in range(comm.cp_size):
            pending, following = None, packed
            next_owner = (owner - 1) % comm.cp_size
            if step < comm.cp_size - 1:
                following = packed.new_empty(elements_per_token * layout[next_owner].tokens)
                pending = comm.exchange(
                    packed,
                    following,
                    sent={(comm.cp_rank + 1) % comm.cp_size: packed.numel()},
                    arriving={(comm.cp_rank - 1) % comm.cp_size: following.numel()},
                    total=total,
                )
            tokens = layout[owner].tokens
            key_elements = B * tokens * G * k_size
            k = packed[:key_elements].reshape(B, tokens, G, k_size)
            v = packed[key_elements:].reshape(B, tokens, v_heads, v_size)
            _attend_to(states, q_BQHD, own, k, v, layout[owner], rule)
            if pending is not None:
                pending.wait()
                packed, owner = following, next_owner
            comm.tick()
        H, device = q_BQHD.shape[2], q_BQHD.device
        merged = [
            merge(parts) if parts else empty_state(B, stop - start, H, v_size, device)
            for parts, (start, stop) in zip(states, own, strict=True)
        ]
        return State(
            torch.cat([s.out_BQHD.float() for s in merged], 1),
            torch.cat([s.lse_BQH for s in merged], 1),
        )


class RingCache(StarCache):
    """The cache for one forward of a rank's own tokens, of contexts of equal length."""

    position: RingPosition

    def __init__(
        self,
        layout: tuple[Segments, ...],
        stores: list[ContextKV],
        windows: list[int | None],
        comm: Comm,
    ) -> None:
        position = RingPosition(layout=layout, comm=comm)
        super().__init__(build_layers(RingLayer, windows, position, stores), position, comm)


def _attend_to(
    states: list[list[State]],
    q_BQHD: Tensor,
    own: Segments,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    passing: Segments,
    rule: Rule,
) -> None:
    """Add to each own segment's states its attention to the segments that pass by."""
    row = 0
    for parts, (start, stop) in zip(states, own, strict=True):
        q_part, at = q_BQHD[:, row : row + stop - start], 0
        row += stop - start
        for first, last in passing:
            keys = slice(at, at + last - first)
            at = keys.stop
            # Keys after all of the queries are invisible to them.
            if first >= stop:
                continue
            k_part, v_part = k_BKGD[:, keys], v_BKGD[:, keys]
            parts.append(attend(q_part, k_part, v_part, rule=rule, offset=start - first))
