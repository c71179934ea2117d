"""Ring attention inside transformers: exact attention over tokens that are dealt out to ranks (phase 1 of `ring`).

Each rank has the queries of its own tokens; the keys and values go round, and each rank attends to what passes by. The
transfer of the next share runs while the present one is attended to.

Axes: B batch, S this rank's tokens, K keys, Q queries, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.state import State, empty_state, merge
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import StarCache, _Place, _StarLayer
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, LayerKV


class _RingPlace(_Place):
    seen_tokens = 0

    def __init__(self, layout: tuple[Segments, ...], comm: Comm) -> None:
        self.layout = layout
        self.comm = comm


class RingLayer(_StarLayer):
    place: _RingPlace

    def __init__(
        self, index: int, place: _RingPlace, window: int | None, stores: list[LayerKV]
    ) -> None:
        super().__init__(index, place, window)
        self.stores = stores  # one per context of the batch

    @property
    def kv(self) -> LayerKV:
        return self.stores[0]

    def learn(self, *, expands: bool) -> None:
        for store in self.stores:
            store.expands = expands

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        for store, k_GSD, v_GSD in zip(self.stores, k_BGSD, v_BGSD, strict=True):
            for start, stop in store.segments:
                at = store.segments.offset(start)
                store.write(
                    start, k_GSD[:, at : at + stop - start], v_GSD[:, at : at + stop - start]
                )
        return k_BGSD, v_BGSD

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        layout, comm = self.place.layout, self.place.comm
        B, _, G, k_size = k_BKGD.shape
        v_heads, v_size = v_BKGD.shape[2:]
        numbers = B * (G * k_size + v_heads * v_size)  # of one token
        own, owner = layout[comm.cp_rank], comm.cp_rank
        total = numbers * sum(segments.tokens for segments in layout)
        passing = torch.cat([k_BKGD.reshape(-1), v_BKGD.reshape(-1)])
        states: list[list[State]] = [[] for _ in own]
        for step in range(comm.cp_size):
            pending, following = None, passing
            if step < comm.cp_size - 1:
                behind = (owner - 1) % comm.cp_size
                following = passing.new_empty(numbers * layout[behind].tokens)
                pending = comm.exchange(
                    passing,
                    following,
                    target=(comm.cp_rank + 1) % comm.cp_size,
                    source=(comm.cp_rank - 1) % comm.cp_size,
                    total=total,
                )
            held = layout[owner].tokens
            keys = B * held * G * k_size
            k = passing[:keys].reshape(B, held, G, k_size)
            v = passing[keys:].reshape(B, held, v_heads, v_size)
            _attend_to(states, q_BQHD, own, k, v, layout[owner], rule)
            if pending is not None:
                pending.wait()
                passing, owner = following, (owner - 1) % comm.cp_size
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


def _attend_to(
    states: list[list[State]],
    q_BQHD: Tensor,
    own: Segments,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    held: Segments,
    rule: Rule,
) -> None:
    """Add to each own segment's states what its queries see of the segments that pass by."""
    row = 0
    for parts, (start, stop) in zip(states, own, strict=True):
        q_part, at = q_BQHD[:, row : row + stop - start], 0
        row += stop - start
        for first, last in held:
            keys = slice(at, at + last - first)
            at = keys.stop
            if first < stop:  # what lies behind the queries is not seen
                parts.append(
                    attend(
                        q_part, k_BKGD[:, keys], v_BKGD[:, keys], rule=rule, offset=start - first
                    )
                )


class RingCache(StarCache):
    """One forward of a rank's own tokens, for one context or several of equal length."""

    def __init__(
        self,
        layout: tuple[Segments, ...],
        stores: list[ContextKV],
        windows: list[int | None],
        comm: Comm,
    ) -> None:
        place = _RingPlace(layout, comm)
        layers: list[Any] = [
            RingLayer(index, place, window, [store.layers[index] for store in stores])
            for index, window in enumerate(windows)
        ]
        super().__init__(layers, place, comm)
