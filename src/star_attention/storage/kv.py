"""Keys and values of one encoded context, and of the tail that a query adds to it.

Axes: B batch rows, G KV heads, L tokens, D head size. Buffers lie as `[1, G, L, D]`, one per layer; a head's keys are
contiguous, which is what decoding reads.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.planning.plan import Segments

Pair = tuple[Tensor, Tensor]
StoredKV = tuple[Tensor, ...]
"""What is stored: keys and values, behind them in fp8 the scales of both, `[1, G, L]`."""

NAMES = ("k", "v", "k_scale", "v_scale")
FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """How a context's keys and values are stored.

    dtype: None as they were computed, "fp8" in e4m3 with a scale for each token of each head (a little over half the bytes of
    bfloat16). device: None where they were computed, "cpu" in the host's memory, from which each layer is brought when it is read.
    """

    dtype: str | None = None
    device: str | None = None

    @property
    def as_computed(self) -> bool:
        return self.dtype is None and self.device is None


DEFAULT_FORMAT = KVFormat()


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., D]` in e4m3, and the fp32 scale `[...]` of each row: its largest number becomes the largest of e4m3."""
    scale = x.abs().amax(-1).float().div_(_FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scale[..., None]).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8), scale


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine ran out of memory; torch reports a full host as a plain error of its allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _allocated(make: Callable[[], Tensor]) -> Tensor:
    """What `make` allocates, at a second attempt if need be: whole contexts may wait for Python's garbage collector, which looks
    at the number of objects and not at their size. (What torch.compile leaves behind refers to the first one.)
    """
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    return make()


class LayerKV:
    """One layer's context keys and values, `[1, G, tokens, D]`, written once, block by block, then only read.

    held: which context tokens, as runs that lie one behind the other in the buffers; a number stands for `0..number`.
    `expands` is True for layers whose attention computes keys and values from what is cached (MLA), None while not
    known. `source` delivers what a saved context has stored at first touch, for attention on `device` in `dtype`.
    """

    def __init__(
        self,
        held: int | Segments,
        *,
        expands: bool | None = None,
        kv_format: KVFormat = DEFAULT_FORMAT,
        source: Callable[[], StoredKV] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.segments: Segments = ((0, held),) if isinstance(held, int) else held
        self.tokens = sum(stop - start for start, stop in self.segments)
        self.expands = expands
        self.kv_format = kv_format
        self._source = source
        self._dtype, self._device = dtype, device  # with which attention reads them
        self._kept: StoredKV | None = None

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
        self._dtype, self._device = k_GSD.dtype, k_GSD.device
        parts: StoredKV = (k_GSD, v_GSD)
        if self.kv_format.dtype is not None:
            (k_GSD, k_scale_GS), (v_GSD, v_scale_GS) = quantized(k_GSD), quantized(v_GSD)
            parts = (k_GSD, v_GSD, k_scale_GS, v_scale_GS)
        self._write(start, parts)

    def _write(self, start: int, parts: StoredKV) -> None:
        if self._kept is None:
            self._kept = tuple(self._room(part) for part in parts)
        at = self._at(start)
        for buffer, part in zip(self._kept, parts, strict=True):
            buffer[0, :, at : at + part.shape[1]].copy_(part, non_blocking=True)

    def _room(self, part: Tensor) -> Tensor:
        shape = (1, part.shape[0], self.tokens, *part.shape[2:])
        if self.kv_format.device is None or part.device.type == "cpu":
            return _allocated(lambda: part.new_empty(shape))
        return _allocated(
            lambda: torch.empty(
                shape, dtype=part.dtype, device=self.kv_format.device, pin_memory=True
            )
        )

    @property
    def is_empty(self) -> bool:
        """Nothing was written: a layer that reads another layer's keys and values (KV sharing)."""
        return self._kept is None and self._source is None

    def stored(self) -> StoredKV:
        """What is stored, as it is stored; a saved context is read and verified at first touch."""
        if self._source is not None:
            self._kept = self._source()
            self._source = None
        assert self._kept is not None, "this layer holds no keys"
        return self._kept

    def pair(self) -> Pair:
        """All keys and values, `[1, G, tokens, D]`, for attention: the buffers, or copies where they are stored in another way."""
        return self._read(self.stored())

    def slice(self, start: int, stop: int) -> Pair:
        """The same of tokens `start..stop`, which lie in one segment, `[1, G, stop - start, D]`."""
        kept, at = self.stored(), self._at(start)
        return self._read(tuple(tensor[:, :, at : at + stop - start] for tensor in kept))

    def _read(self, kept: StoredKV) -> Pair:
        if self.kv_format.as_computed:
            return kept[0], kept[1]
        assert self._dtype is not None
        k_1GLD, v_1GLD, *scales = (tensor.to(self._device, non_blocking=True) for tensor in kept)
        if scales:
            k_1GLD, v_1GLD = (
                tensor.to(self._dtype).mul_(scale[..., None])
                for tensor, scale in zip((k_1GLD, v_1GLD), scales, strict=True)
            )
        return k_1GLD, v_1GLD

    @property
    def nbytes(self) -> int:
        return 0 if self.is_empty else sum(t.numel() * t.element_size() for t in self.stored())

    def take(self, other: LayerKV) -> None:
        """All that another layer holds, which this one has room for, as it is stored there."""
        self._dtype, self._device = other._dtype, other._device
        kept = other.stored()
        at = 0
        for start, stop in other.segments:
            self._write(start, tuple(tensor[0, :, at : at + stop - start] for tensor in kept))
            at += stop - start


@dataclass(frozen=True, kw_only=True)
class VisibleRange:
    """The first tokens of a context, and of all else those that are fewer than `recent` tokens back."""

    first: int
    recent: int


class ContextKV:
    """All layers of what one rank keeps of a context (its shard): the whole context on one rank.

    visible: what queries see of it; None: all.
    """

    def __init__(
        self, layers: list[LayerKV], held: int | Segments, visible: VisibleRange | None = None
    ) -> None:
        self.layers = layers
        self.visible = visible
        self.segments: Segments = ((0, held),) if isinstance(held, int) else held
        self.tokens = sum(stop - start for start, stop in self.segments)

    @classmethod
    def empty(
        cls,
        held: int | Segments,
        expands: list[bool | None],
        kv_format: KVFormat = DEFAULT_FORMAT,
        visible: VisibleRange | None = None,
    ) -> ContextKV:
        """Room for these tokens; `expands` as far as it is known, one entry a layer."""
        return cls(
            [LayerKV(held, expands=known, kv_format=kv_format) for known in expands], held, visible
        )

    @property
    def kv_format(self) -> KVFormat:
        return self.layers[0].kv_format

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values. Touches every layer of a context loaded from a file."""
        return sum(layer.nbytes for layer in self.layers)

    def grown(self, held: int | Segments) -> ContextKV:
        """A new, larger store that starts with all of this one (copied); `held` begins where this one does."""
        new = ContextKV.empty(held, [layer.expands for layer in self.layers], self.kv_format)
        for old_layer, layer in zip(self.layers, new.layers, strict=True):
            if not old_layer.is_empty:
                layer.take(old_layer)
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
        return (
            self._k_BGCD.shape[2]
            if self._k_BGCD is not None and self._k_BGCD.shape[0] == rows
            else 0
        )

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
        tokens = max(_ROOM, needed, 0 if buffer is None else 2 * buffer.shape[2])
        larger = _allocated(lambda: new_BGSD.new_empty(B, G, tokens, D))
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
