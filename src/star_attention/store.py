"""Keys and values of one encoded context, and of the tail that a query adds to it.

Axes: B batch rows, G KV heads, L tokens, D head size. Buffers lie as `[1, G, L, D]`, one per layer; a head's keys are
contiguous, which is what decoding reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from star_attention.plan import Segments

Pair = tuple[Tensor, Tensor]


class LayerKV:
    """One layer's context keys and values, `[1, G, tokens, D]`, written once, block by block, then only read.

    held: which context tokens, as runs that lie one behind the other in the buffers; a number stands for `0..number`.
    `expands` is True for layers whose attention computes keys and values from what is cached (MLA), None while not
    known. `source` delivers the tensors of a saved context at first touch.
    """

    def __init__(
        self, held: int | Segments, *, expands: bool | None = None, source: Callable[[], Pair] | None = None
    ) -> None:
        self.segments: Segments = ((0, held),) if isinstance(held, int) else held
        self.tokens = sum(stop - start for start, stop in self.segments)
        self.expands = expands
        self._source = source
        self._k_1GLD: Tensor | None = None
        self._v_1GLD: Tensor | None = None

    def holds(self, position: int) -> bool:
        return any(start <= position < stop for start, stop in self.segments)

    def _at(self, position: int) -> int:
        """Where a token lies in the buffers."""
        at = 0
        for start, stop in self.segments:
            if start <= position < stop:
                return at + position - start
            at += stop - start
        raise AssertionError(f"token {position} is not held here ({self.segments})")

    def write(self, start: int, k_GSD: Tensor, v_GSD: Tensor) -> None:
        """Keep the keys and values of tokens `start..start+S`; the buffers are allocated at the first write."""
        if self._k_1GLD is None or self._v_1GLD is None:
            self._k_1GLD = k_GSD.new_empty(1, k_GSD.shape[0], self.tokens, k_GSD.shape[2])
            self._v_1GLD = v_GSD.new_empty(1, v_GSD.shape[0], self.tokens, v_GSD.shape[2])
        at = self._at(start)
        stop = at + k_GSD.shape[1]
        self._k_1GLD[0, :, at:stop].copy_(k_GSD)
        self._v_1GLD[0, :, at:stop].copy_(v_GSD)

    @property
    def is_empty(self) -> bool:
        """Nothing was written: a layer that reads another layer's keys and values (KV sharing)."""
        return self._k_1GLD is None and self._source is None

    def pair(self) -> Pair:
        """The whole buffers, `[1, G, tokens, D]`; a saved context is read, verified and moved here at first touch."""
        if self._source is not None:
            self._k_1GLD, self._v_1GLD = self._source()
            self._source = None
        assert self._k_1GLD is not None and self._v_1GLD is not None, "this layer holds no keys"
        return self._k_1GLD, self._v_1GLD

    def slice(self, start: int, stop: int) -> Pair:
        """Views of tokens `start..stop`, which lie in one segment, `[1, G, stop - start, D]`."""
        k_1GLD, v_1GLD = self.pair()
        at = self._at(start)
        return k_1GLD[:, :, at : at + stop - start], v_1GLD[:, :, at : at + stop - start]

    @property
    def nbytes(self) -> int:
        return 0 if self.is_empty else sum(t.numel() * t.element_size() for t in self.pair())


class ContextKV:
    """All layers of what one rank keeps of a context (its shard): the whole context on one rank."""

    def __init__(self, layers: list[LayerKV], held: int | Segments) -> None:
        self.layers = layers
        self.segments: Segments = ((0, held),) if isinstance(held, int) else held
        self.tokens = sum(stop - start for start, stop in self.segments)

    @classmethod
    def empty(cls, held: int | Segments, expands: list[bool | None]) -> ContextKV:
        """Room for these tokens; `expands` as far as it is known, one entry a layer."""
        return cls([LayerKV(held, expands=known) for known in expands], held)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values. Touches every layer of a context loaded from a file."""
        return sum(layer.nbytes for layer in self.layers)

    def grown(self, held: int | Segments) -> ContextKV:
        """A new, larger store that starts with all of this one (copied); `held` begins where this one does."""
        new = ContextKV.empty(held, [layer.expands for layer in self.layers])
        for old_layer, layer in zip(self.layers, new.layers, strict=True):
            if not old_layer.is_empty:
                for start, stop in self.segments:
                    k_1GSD, v_1GSD = old_layer.slice(start, stop)
                    layer.write(start, k_1GSD[0], v_1GSD[0])
        return new


_ROOM = 64
"""Tokens for which a tail has room at first."""


class Tail:
    """Keys and values of query and generated tokens of one layer, `[B, G, length, D]`, growing by doubling.

    (A concatenation per token would copy the whole tail each time.)
    """

    def __init__(self) -> None:
        self.length = 0
        self.version = 0  # of the buffers: changes whenever they lie elsewhere
        self._k_BGCD: Tensor | None = None
        self._v_BGCD: Tensor | None = None

    def reserve(self, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        """Room for as many tokens as these more, which are like them in shape otherwise."""
        self._k_BGCD = self._room(self._k_BGCD, k_BGSD)
        self._v_BGCD = self._room(self._v_BGCD, v_BGSD)

    def capacity(self, rows: int) -> int:
        """Tokens for which there is room, 0 where the buffers are of another number of rows."""
        return self._k_BGCD.shape[2] if self._k_BGCD is not None and self._k_BGCD.shape[0] == rows else 0

    def buffers(self) -> Pair:
        """All of the buffers, `[B, G, capacity, D]`, of which the first `length` tokens are in use."""
        assert self._k_BGCD is not None and self._v_BGCD is not None, "the tail is empty"
        return self._k_BGCD, self._v_BGCD

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        self.reserve(k_BGSD, v_BGSD)
        assert self._k_BGCD is not None and self._v_BGCD is not None
        stop = self.length + k_BGSD.shape[2]
        self._k_BGCD[:, :, self.length : stop] = k_BGSD
        self._v_BGCD[:, :, self.length : stop] = v_BGSD
        self.length = stop

    def _room(self, buffer: Tensor | None, new_BGSD: Tensor) -> Tensor:
        B, G, S, D = new_BGSD.shape
        needed = self.length + S
        if buffer is not None and buffer.shape[2] >= needed:
            return buffer
        self.version += 1
        larger = new_BGSD.new_empty(B, G, max(_ROOM, needed, 0 if buffer is None else 2 * buffer.shape[2]), D)
        if buffer is not None:
            larger[:, :, : self.length] = buffer[:, :, : self.length]
        return larger

    def pair(self) -> Pair:
        assert self._k_BGCD is not None and self._v_BGCD is not None, "the tail is empty"
        return self._k_BGCD[:, :, : self.length], self._v_BGCD[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder batch rows (beams)."""
        if self._k_BGCD is not None and self._v_BGCD is not None:
            rows = rows.to(self._k_BGCD.device)
            self.version += 1
            self._k_BGCD = self._k_BGCD.index_select(0, rows)
            self._v_BGCD = self._v_BGCD.index_select(0, rows)

    def crop(self, tokens: int) -> None:
        """Drop the last `tokens` tokens."""
        assert 0 <= tokens <= self.length, "only the tail can be cropped, never the context"
        self.length -= tokens


def as_tensor_ids(ids: Tensor) -> Tensor:
    """Token ids as a contiguous 1-D int64 CPU tensor."""
    return ids.detach().to(device="cpu", dtype=torch.int64).reshape(-1).contiguous()
