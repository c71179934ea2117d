"""Phase 1: encode a context block by block (paper, section 2.1).

Each block attends to itself and to the anchor. Every context token passes through the linear layers
once: the anchor's keys and values do not depend on who reads them, so blocks share them. On several
ranks each rank encodes its own blocks, and rank 0, which holds the anchor, sends it to the others
layer by layer.

Axes: B contexts, L tokens of each, S tokens of a forward.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.config import StarConfig
from star_attention.distributed.comm import Comm, Pending
from star_attention.hf.cache.encode import AnchorLink, EncodeCache, SpanCache
from star_attention.hf.cache.probe import LayerKVShape
from star_attention.hf.execution.compiled import FULL
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.progress import Progress
from star_attention.planning.plan import BlockPlan, Span
from star_attention.planning.segments import Segments
from star_attention.storage.kv import DEFAULT_FORMAT, ContextKV, KVFormat
from star_attention.storage.oom import translate_oom

_WORTH_COMPILING = 4096
"""Fewest tokens of a forward that is compiled.

Compiling takes seconds, and forwards of few tokens wait for launches rather than for the device.
"""

_LAYERS_AHEAD = 2
"""Layers ahead of use for which a rank requests the anchor: enough to hide the transfer."""


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """A batch of contexts of equal length, with everything that phase 1 needs to encode it.

    Attributes:
        handle: the model.
        comm: the ranks that share the work.
        config: the engine's settings.
        ids_BL: token ids, int64 `[B, L]` on CPU.
        plan: blocks and anchor.
        layout: the segments that each context-parallel rank keeps.
        rope_length: tokens that length-dependent rotary frequencies are computed for, or None.
        progress: called after each forward.
    """

    handle: ModelHandle
    comm: Comm
    config: StarConfig
    ids_BL: Tensor
    plan: BlockPlan
    layout: tuple[Segments, ...]
    rope_length: int | None = None
    progress: Progress | None = None

    @property
    def contexts(self) -> int:
        """Number of contexts, B."""
        return self.ids_BL.shape[0]

    @property
    def segments(self) -> Segments:
        """The tokens that this rank keeps."""
        return self.layout[self.comm.cp_rank]

    @property
    def tokens_per_forward(self) -> int:
        """Most tokens of one forward, over all contexts of the batch."""
        return self.config.forward_size(self.handle.device.type)

    @property
    def span_tokens(self) -> int:
        """Most tokens of each context in one forward."""
        return max(1, self.tokens_per_forward // self.contexts)

    @property
    def kv_format(self) -> KVFormat:
        """The format that the contexts' keys and values are stored in."""
        return KVFormat(dtype=self.config.kv_dtype, device=self.config.kv_device)


def encode(job: EncodeJob) -> list[ContextKV]:
    """Encode a batch of contexts, block by block.

    Blocks read the anchor as it was computed, whatever format the contexts are stored in.

    Returns:
        This rank's keys and values, one store for each context.

    Raises:
        OutOfMemoryError: the device or the machine has too little memory. Names the size to lower;
            what was allocated is freed.
    """
    plan, comm = job.plan, job.comm
    stores = _empty_stores(job, job.segments, job.kv_format)
    if comm.cp_rank >= plan.busy_ranks:
        return stores
    shares_anchor = plan.busy_ranks > 1 and plan.anchor_size > 0
    broadcasts = shares_anchor and job.config.anchor_source == "broadcast"
    receives = shares_anchor and comm.cp_rank > 0
    anchors: list[ContextKV] | None = None
    if receives or (not job.kv_format.as_computed and plan.anchor_size > 0 and plan.num_blocks > 1):
        anchors = _empty_stores(job, Segments.prefix(plan.anchor_size))
    link: AnchorLink | None = None
    if broadcasts and not receives:
        link = _AnchorSender(comm, plan)
    elif broadcasts:
        assert anchors is not None
        link = _AnchorReceiver(job, anchors)
    cache = EncodeCache(plan, stores, job.handle.windows, comm, anchors=anchors, link=link)
    forwards = Forwards(job)
    if receives and not broadcasts:
        forwards.run(cache, anchor_spans(plan, job.span_tokens))
    forwards.run(cache, plan.spans(job.span_tokens, rank=comm.cp_rank))
    if isinstance(link, _AnchorSender):
        link.finish()
    return stores


def extend(job: EncodeJob, kv: ContextKV, *, start: int, owner: int) -> ContextKV:
    """Encode the tokens from `start` on, after a context whose keys and values `kv` holds.

    Args:
        job: one context, with all of its ids, old and new.
        kv: this rank's share of the old context.
        start: first new token.
        owner: the context-parallel rank that holds the last old token; it encodes the new ones.

    Returns:
        The share with the new tokens on the owner, `kv` itself on the other ranks.
    """
    plan, comm = job.plan, job.comm
    anchors = None
    if owner > 0 and plan.anchor_size:
        anchors = [_send_anchor_to(owner, job, kv)]
    if comm.cp_rank != owner:
        return kv
    store = kv.grown(kv.segments.grow_to(plan.context_tokens))
    cache = EncodeCache(
        plan, [store], job.handle.windows, comm, anchors=anchors, keeps_recent=False
    )
    Forwards(job).run(cache, plan.from_token(start, job.tokens_per_forward))
    return store


def _empty_stores(
    job: EncodeJob, segments: Segments, kv_format: KVFormat = DEFAULT_FORMAT
) -> list[ContextKV]:
    return [empty(job.handle, segments, job.comm, kv_format) for _ in range(job.contexts)]


def empty(
    handle: ModelHandle, segments: Segments, comm: Comm, kv_format: KVFormat = DEFAULT_FORMAT
) -> ContextKV:
    """Return an empty store for these tokens.

    The first forward shows which layers expand what they store. A rank of several may have no
    forward of its own, so they probe the model instead.
    """
    if comm.cp_size == 1:
        return ContextKV.empty(segments, [None] * len(handle.windows), kv_format)
    expands = [None if shape is None else shape.expands for shape in handle.layer_shapes]
    return ContextKV.empty(segments, expands, kv_format)


def anchor_spans(plan: BlockPlan, span_tokens: int) -> Iterator[Span]:
    """Yield the forwards that compute the anchor alone, as pieces of the first block."""
    for start in range(0, plan.anchor_size, span_tokens):
        yield Span(start=start, stop=min(start + span_tokens, plan.anchor_size), block_start=0)


class Forwards:
    """Runs spans of a batch of contexts through the decoder."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job

    def run(self, cache: SpanCache, spans: Iterable[Span]) -> None:
        """Encode spans in order.

        Raises:
            OutOfMemoryError: with the size to lower.
        """
        job, handle, plan, comm = self._job, self._job.handle, self._job.plan, self._job.comm
        with translate_oom(lambda: self._out_of_memory(cache)):
            own_tokens = job.segments.tokens
            comm.progress(0, own_tokens)
            done, spans = 0, list(spans)
            usual = self._usual_tokens(spans)
            cache.after_layer = self._after_layer(cache)
            # All at once: a copy from host memory waits for whatever the device has to do before.
            ids_BL = job.ids_BL.to(handle.device)
            for span in spans:
                cache.span = span
                comm.tick(
                    f"phase 1, tokens {span.start:,} to {span.stop:,} of {plan.context_tokens:,}"
                )
                positions_1S = torch.arange(span.start, span.stop, device=handle.device)[None]
                ids_BS = ids_BL[:, span.start : span.stop]
                mode = FULL if span.tokens == usual else None
                handle.encode(ids_BS, positions_1S, cache, job.rope_length, compiled_for=mode)
                done += span.tokens
                comm.progress(done, max(done, own_tokens))
                if job.progress is not None:
                    job.progress(span, plan)

    def _after_layer(self, cache: SpanCache) -> Callable[[], None] | None:
        """Return what reports a layer of the current forward, for callbacks that ask for it."""
        report, plan = getattr(self._job.progress, "layer", None), self._job.plan
        if report is None:
            return None
        num_layers = len(self._job.handle.windows)

        def after_layer() -> None:
            report(cache.span, plan, (cache.calls - 1) % num_layers + 1, num_layers)

        return after_layer

    def _usual_tokens(self, spans: list[Span]) -> int | None:
        """Return the span length that is worth compiling for; other lengths run eagerly.

        It is the length of most forwards, or of a forward of the largest size.
        """
        job = self._job
        counts = Counter(
            span.tokens for span in spans if span.tokens * job.contexts >= _WORTH_COMPILING
        )
        for tokens, count in counts.most_common(1):
            if count > 1 or tokens * job.contexts == job.tokens_per_forward:
                return tokens
        return None

    def _out_of_memory(self, cache: SpanCache) -> str:
        job = self._job
        return (
            f"out of memory in phase 1 after {cache.span.start:,} of {job.plan.context_tokens:,}"
            f" context tokens, with {cache.span.tokens * job.contexts:,} tokens in one forward:"
            f" lower tokens_per_forward (now {job.tokens_per_forward:,}; it sets the working"
            " memory), keep keys and values in fp8 (kv_dtype) or in host memory (kv_device), or"
            f" encode a shorter context ({cache.bytes_per_token:,} bytes per token here)"
        )


# --------------------------------------------------------------------- how the anchor travels


class _AnchorSender(AnchorLink):
    """Sends each layer's part of the anchor from rank 0 once it is computed, without waiting."""

    def __init__(self, comm: Comm, plan: BlockPlan) -> None:
        self._comm, self._plan = comm, plan
        self._pending: list[Pending] = []

    def send(self, layer: int, span: Span, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        tokens = min(span.stop, self._plan.anchor_size) - span.start
        if tokens > 0:
            packed = _pack(k_BGSD[:, :, :tokens], v_BGSD[:, :, :tokens])
            self._pending.append(self._comm.broadcast(packed, self._plan.busy_ranks))

    def finish(self) -> None:
        for pending in self._pending:
            pending.wait()


@dataclass(frozen=True)
class _AnchorPart:
    """One layer's keys and values of `tokens` anchor tokens from `start` on."""

    layer: int
    start: int
    tokens: int


class _AnchorReceiver(AnchorLink):
    """Requests the anchor on other ranks a few layers ahead, in the order in which rank 0 sends."""

    def __init__(self, job: EncodeJob, anchors: list[ContextKV]) -> None:
        self._handle, self._comm, self._plan = job.handle, job.comm, job.plan
        self._anchors = anchors
        layers = [i for i, shape in enumerate(job.handle.layer_shapes) if shape is not None]
        anchor_size = job.plan.anchor_size
        self._waiting = deque(
            _AnchorPart(layer, span.start, min(span.stop, anchor_size) - span.start)
            for span in job.plan.spans(job.span_tokens, rank=0)
            if span.start < anchor_size
            for layer in layers
        )
        self._in_flight: deque[tuple[_AnchorPart, Tensor, Pending]] = deque()

    def wait_for(self, layer: int) -> None:
        if not (self._waiting or self._in_flight):
            return
        # Rank 0 sends all layers of one part of the anchor, then all layers of the next part.
        last = max((i for i, part in enumerate(self._waiting) if part.layer == layer), default=-1)
        for _ in range(min(last + 1 + _LAYERS_AHEAD, len(self._waiting))):
            self._request_next()
        while any(part.layer == layer for part, *_ in self._in_flight):
            self._store_first()

    def _request_next(self) -> None:
        part = self._waiting.popleft()
        shape = self._shape(part.layer)
        packed = torch.empty(
            len(self._anchors) * part.tokens * shape.elements,
            dtype=shape.dtype,
            device=self._handle.layer_device(part.layer),
        )
        pending = self._comm.broadcast(packed, self._plan.busy_ranks)
        self._in_flight.append((part, packed, pending))

    def _store_first(self) -> None:
        part, packed, pending = self._in_flight.popleft()
        pending.wait()
        shape = self._shape(part.layer)
        k_BGSD, v_BGSD = _unpack(packed, shape, len(self._anchors), part.tokens)
        for store, k_GSD, v_GSD in zip(self._anchors, k_BGSD, v_BGSD, strict=True):
            store.layers[part.layer].write(part.start, k_GSD, v_GSD)

    def _shape(self, layer: int) -> LayerKVShape:
        shape = self._handle.layer_shapes[layer]
        assert shape is not None
        return shape


def _send_anchor_to(owner: int, job: EncodeJob, kv: ContextKV) -> ContextKV:
    """Send rank 0's anchor to `owner`, which needs it to extend a context. Collective.

    Returns:
        The anchor on `owner`, an empty store on the other ranks.
    """
    handle, comm, anchor_size = job.handle, job.comm, job.plan.anchor_size
    anchor = empty(handle, Segments.prefix(anchor_size), comm)
    for layer, shape in enumerate(handle.layer_shapes):
        if shape is None:
            continue
        size, device = anchor_size * shape.elements, handle.layer_device(layer)
        received = torch.empty(
            size if comm.cp_rank == owner else 0, dtype=shape.dtype, device=device
        )
        sent = torch.empty(0, dtype=shape.dtype, device=device)
        if comm.cp_rank == 0:
            sent = _pack(*kv.layers[layer].slice(0, anchor_size))
        comm.exchange(sent, received, target=owner, source=0, total=size).wait()
        if comm.cp_rank == owner:
            k_1GSD, v_1GSD = _unpack(received, shape, 1, anchor_size)
            anchor.layers[layer].write(0, k_1GSD[0], v_1GSD[0])
    return anchor


def _pack(k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    return torch.cat([k_BGSD.reshape(-1), v_BGSD.reshape(-1)])


def _unpack(packed: Tensor, shape: LayerKVShape, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    keys = batch * tokens * shape.k_heads * shape.k_size
    return (
        packed[:keys].reshape(batch, shape.k_heads, tokens, shape.k_size),
        packed[keys:].reshape(batch, shape.v_heads, tokens, shape.v_size),
    )
