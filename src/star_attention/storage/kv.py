"""Keys and values of one encoded context.

Axes: G KV heads, L tokens, S new tokens, D head size. Buffers are `[1, G, L, D]`, one pair per
layer; the keys of a head are contiguous, which is how decoding reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from star_attention.planning.residency import stays
from star_attention.planning.segments import Segments
from star_attention.planning.windows import ALL
from star_attention.storage.host import pinned
from star_attention.storage.host.streams import Outbox
from star_attention.storage.oom import allocate

Pair = tuple[Tensor, Tensor]
StoredKV = tuple[Tensor, ...]
"""Keys and values as they are stored; in fp8 followed by the scales of both, `[1, G, L]`."""

NAMES = ("k", "v", "k_scale", "v_scale")
FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """Precision, place and extent of a context's stored keys and values.

    Attributes:
        dtype: None stores them as computed; "fp8" stores e4m3 with one scale per token and head,
            a little over half the bytes of bfloat16.
        device: None stores them on the device that computed them; "cpu" stores them in host memory,
            from which each layer is copied back when it is read.
        resident: share of the layers that stay on the device, whatever `device` says.
        windows: what is kept of layers with a sliding window, as `kv_windows` in `StarConfig`.
    """

    dtype: str | None = None
    device: str | None = None
    resident: float = 0.0
    windows: str = ALL

    @property
    def as_computed(self) -> bool:
        """True if attention can read the buffers of all layers directly."""
        return self.dtype is None and self.device is None

    def on_host(self, layer: int, layers: int) -> bool:
        """True if a layer of so many is in host memory."""
        return self.device is not None and not stays(layer, layers, self.resident)


DEFAULT_FORMAT = KVFormat()


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows to e4m3.

    Args:
        x: `[..., D]`, any floating-point dtype.

    Returns:
        `[..., D]` in e4m3, and the fp32 scale `[...]` of each row, which maps the row's largest
        magnitude to the largest one of e4m3.
    """
    scale = x.abs().amax(-1).float().div_(_FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scale[..., None]).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8), scale


QUANTIZERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"fp8": quantize}
"""Quantizers by the name of a precision in `config.KV_DTYPES`.

Each turns `[..., D]` into stored values `[..., D]` and one scale per row, `[...]`.
"""


class Feeder(Protocol):
    """Brings layers from host memory ahead of their use (`storage.host.feed`)."""

    def take(self, layer: LayerKV) -> StoredKV:
        """Return a layer's stored tensors on its device."""

    def bring(self, layer: LayerKV) -> int:
        """Bring a layer to its device, and return which of its places it is at."""

    def places(self, layer: LayerKV) -> list[StoredKV]:
        """Return a layer's tensors at each place where it may arrive."""

    def forget(self, layer: LayerKV) -> None:
        """Bring a layer again, which has changed."""


class LayerKV:
    """One layer's context keys and values, `[1, G, tokens, D]`: written once, block by block.

    Args:
        segments: the context tokens that the buffers hold.
        expands: True for layers whose attention expands compressed KV to keys and values (MLA);
            None while unknown.
        kv_format: how keys and values of all layers are stored.
        on_host: True if those of this layer are in host memory.
        outbox: writes there, for all layers.
        source: reads the stored tensors of a saved context, on first use.
        dtype: dtype in which attention reads a saved context.
        device: device on which attention reads a saved context.

    Attributes:
        feed: returns what brings the layer from host memory to its device, or None.
    """

    def __init__(
        self,
        segments: Segments,
        *,
        expands: bool | None = None,
        kv_format: KVFormat = DEFAULT_FORMAT,
        on_host: bool = False,
        outbox: Outbox | None = None,
        source: Callable[[], StoredKV] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.segments = segments
        self.tokens = segments.tokens
        self.expands = expands
        self.kv_format = kv_format
        self.on_host = on_host
        self.feed: Callable[[], Feeder | None] | None = None
        self._outbox = outbox
        # The latest write to host memory, until somebody has waited for it.
        self._written: Any = None
        self._source = source
        self._dtype, self._device = dtype, device
        self._buffers: StoredKV | None = None

    def holds(self, token: int) -> bool:
        """True if context token `token` is stored here."""
        return self.segments.holds(token)

    def write(self, start: int, k_GSD: Tensor, v_GSD: Tensor) -> None:
        """Store the keys and values of tokens `start..start+S`; the first write allocates."""
        self._dtype, self._device = k_GSD.dtype, k_GSD.device
        self._write(start, self._as_stored(k_GSD, v_GSD))

    def reserve(self, k_GSD: Tensor, v_GSD: Tensor) -> Pair:
        """Make room for what a kernel will write by address, and return the buffers.

        Args:
            k_GSD: keys of any number of tokens, for their shape, dtype and device.
            v_GSD: values, likewise.
        """
        assert self.kv_format.as_computed, "others are converted when they are written"
        self._dtype, self._device = k_GSD.dtype, k_GSD.device
        k_1GLD, v_1GLD = (self._new_buffer(part) for part in (k_GSD, v_GSD))
        self._buffers = k_1GLD, v_1GLD
        return k_1GLD, v_1GLD

    def replace(self, at_S: Tensor, k_GSD: Tensor, v_GSD: Tensor) -> None:
        """Replace what is stored at places `at_S` of the buffers."""
        for buffer, part in zip(self.stored(), self._as_stored(k_GSD, v_GSD), strict=True):
            # Not every device can index numbers of 8 bits: they are copied as bytes.
            if buffer.dtype == FP8:
                buffer, part = buffer.view(torch.uint8), part.view(torch.uint8)
            buffer[0].index_copy_(1, at_S.to(buffer.device), part.to(buffer.device))
        self._has_changed()

    def _as_stored(self, k_GSD: Tensor, v_GSD: Tensor) -> StoredKV:
        if self.kv_format.dtype is None:
            return k_GSD, v_GSD
        quantizer = QUANTIZERS[self.kv_format.dtype]
        (k_GSD, k_scale_GS), (v_GSD, v_scale_GS) = quantizer(k_GSD), quantizer(v_GSD)
        return k_GSD, v_GSD, k_scale_GS, v_scale_GS

    def _write(self, start: int, parts: StoredKV) -> None:
        if self._buffers is None:
            self._buffers = tuple(self._new_buffer(part) for part in parts)
        at = self.segments.offset(start)
        targets = [buffer[0, :, at : at + parts[0].shape[1]] for buffer in self._buffers]
        if self.on_host and parts[0].is_cuda:
            assert self._outbox is not None, "layers in host memory have an outbox"
            self._written = self._outbox.write(targets, list(parts))
        else:
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part, non_blocking=True)
        self._has_changed()

    def _new_buffer(self, part: Tensor) -> Tensor:
        shape = (1, part.shape[0], self.tokens, *part.shape[2:])
        if not self.on_host:
            return allocate(lambda: part.new_empty(shape, device=self._device))
        assert self._device is not None
        return pinned.empty(shape, part.dtype, self._device)

    def _has_changed(self) -> None:
        feed = self.feeder
        if feed is not None:
            feed.forget(self)

    @property
    def feeder(self) -> Feeder | None:
        """What brings the layer from host memory now."""
        return None if self.feed is None else self.feed()

    @property
    def comes_from_host(self) -> bool:
        """True if the layer is copied to a GPU to be read."""
        return self.on_host and not self.is_empty and self.reads_on.type == "cuda"

    @property
    def reads_on(self) -> torch.device:
        """The device on which attention reads the layer."""
        assert self._device is not None, "this layer holds no keys"
        return self._device

    @property
    def is_empty(self) -> bool:
        """True if nothing was written: it reads another layer's KV, or keeps none of the shard."""
        return self._buffers is None and self._source is None

    @property
    def is_loaded(self) -> bool:
        """True if the tensors are in memory; a saved context reads them on first use."""
        return self._buffers is not None

    def stored(self) -> StoredKV:
        """Return the tensors as stored; a saved context is read and verified on first use."""
        if self._source is not None:
            self._buffers = self._source()
            self._source = None
        if self._written is not None and self._outbox is not None:
            self._outbox.wait(self._written)
            self._written = None
        assert self._buffers is not None, "this layer holds no keys"
        return self._buffers

    def elsewhere(self, source: Callable[[], StoredKV] | None) -> LayerKV:
        """Return the same layer with its tensors at another place; None for a layer without any.

        Args:
            source: returns them there, on first use.
        """
        return LayerKV(
            self.segments,
            expands=self.expands,
            kv_format=self.kv_format,
            on_host=self.on_host,
            outbox=self._outbox,
            source=source,
            dtype=self._dtype,
            device=self._device,
        )

    def pair(self) -> Pair:
        """Return all keys and values for attention, `[1, G, tokens, D]`.

        These are the buffers themselves if they are stored as computed, converted copies otherwise.
        Of a layer from host memory they may be overwritten after the next layer's `pair`: queue
        what reads them before.
        """
        feed = self.feeder
        return self._read(self.stored() if feed is None else feed.take(self))

    def slice(self, start: int, stop: int) -> Pair:
        """Return KV of tokens `start..stop` of one segment, `[1, G, stop - start, D]`."""
        at = self.segments.offset(start)
        return self._read(tuple(tensor[:, :, at : at + stop - start] for tensor in self.stored()))

    def _read(self, stored: StoredKV) -> Pair:
        if self.kv_format.as_computed:
            return stored[0], stored[1]
        assert self._dtype is not None and self._device is not None
        k_1GLD, v_1GLD, *scales = (_on(self._device, tensor) for tensor in stored)
        if scales:
            k_1GLD, v_1GLD = (
                tensor.to(self._dtype).mul_(scale[..., None])
                for tensor, scale in zip((k_1GLD, v_1GLD), scales, strict=True)
            )
        return k_1GLD, v_1GLD

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return 0 if self.is_empty else sum(t.numel() * t.element_size() for t in self.stored())

    def copy_from(self, other: LayerKV, runs: Iterable[tuple[int, int]]) -> None:
        """Copy what both layers hold of runs of tokens, unconverted.

        What `other` has not yet read of a saved context, it does not keep.
        """
        self._dtype, self._device = other._dtype, other._device
        stored = other.stored() if other._source is None else other._source()
        both = [part for run in runs for part in other.segments.within(*run)]
        for start, stop in [part for run in both for part in self.segments.within(*run)]:
            at = other.segments.offset(start)
            self._write(start, tuple(tensor[0, :, at : at + stop - start] for tensor in stored))


@dataclass(frozen=True, kw_only=True)
class VisibleRange:
    """The part of a context that queries see, if not all of it: its first and its latest tokens.

    Attributes:
        first: number of tokens at the start of the context that every query sees.
        recent: of all other tokens, a query sees those fewer than `recent` tokens back.
    """

    first: int
    recent: int


class ContextKV:
    """The shard of a context that one rank holds, all layers; on one rank the whole context.

    Args:
        layers: one `LayerKV` per layer, which keeps all tokens of the shard, or the last of them.
        segments: the context tokens of the shard.
        visible: the part of the context that queries see; None for all of it.
    """

    def __init__(
        self, layers: list[LayerKV], segments: Segments, visible: VisibleRange | None = None
    ) -> None:
        self.layers = layers
        self.visible = visible
        self.segments = segments
        self.tokens = segments.tokens

    @classmethod
    def empty(
        cls,
        segments: Segments,
        expands: list[bool | None],
        kv_format: KVFormat = DEFAULT_FORMAT,
        visible: VisibleRange | None = None,
        kept: Sequence[Segments] | None = None,
    ) -> ContextKV:
        """Return a store to write `segments` to; `expands` and what is `kept` are by layer."""
        outbox = None if kv_format.device is None else Outbox()
        pairs = zip(kept or [segments] * len(expands), expands, strict=True)
        layers = [
            LayerKV(
                own,
                expands=value,
                kv_format=kv_format,
                on_host=kv_format.on_host(index, len(expands)),
                outbox=outbox,
            )
            for index, (own, value) in enumerate(pairs)
        ]
        return cls(layers, segments, visible)

    @property
    def kv_format(self) -> KVFormat:
        """The format of the stored keys and values, the same in all layers."""
        return self.layers[0].kv_format

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values. Reads every layer of a context loaded from a file."""
        return sum(layer.nbytes for layer in self.layers)

    def copied(
        self,
        segments: Segments,
        runs: Iterable[tuple[int, int]],
        kept: Sequence[Segments] | None = None,
    ) -> ContextKV:
        """Return a store for `segments`, as `empty`, with copies of these runs of tokens."""
        expands, runs = [layer.expands for layer in self.layers], list(runs)
        copy = ContextKV.empty(segments, expands, self.kv_format, kept=kept)
        for layer, copied_layer in zip(self.layers, copy.layers, strict=True):
            if runs and not layer.is_empty:
                copied_layer.copy_from(layer, runs)
        return copy


def _on(device: torch.device, tensor_1GLD: Tensor) -> Tensor:
    """Return a stored tensor on a device, without waiting for a copy from pinned memory."""
    if tensor_1GLD.device == device or tensor_1GLD.is_contiguous() or device.type != "cuda":
        return tensor_1GLD.to(device, non_blocking=True)
    copy_1GLD = torch.empty(tensor_1GLD.shape, dtype=tensor_1GLD.dtype, device=device)
    # A head at a time: torch copies only contiguous memory without waiting.
    for target_LD, source_LD in zip(copy_1GLD[0], tensor_1GLD[0], strict=True):
        target_LD.copy_(source_LD, non_blocking=True)
    return copy_1GLD
