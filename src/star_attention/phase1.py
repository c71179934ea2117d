"""Phase 1: encode a context block by block (paper, section 2.1).

Each block attends to itself and to the anchor. Every context token passes through the linear layers
once: the anchor's keys and values do not depend on who reads them, so blocks share them. On several
ranks each rank encodes its own blocks, and rank 0, which holds the anchor, sends it to the others
layer by layer.

Axes: B contexts, L tokens of each, S tokens of a forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from star_attention.config import StarConfig
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.encode import EncodeCache, KVLink, Recent, SpanCache
from star_attention.hf.cache.exchange import StripeLink
from star_attention.hf.cache.helping import Helping
from star_attention.hf.cache.links import AnchorReceiver, AnchorSender, Place, Places
from star_attention.hf.execution.compiled import FULL
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.execution.layer_part import LayerPart
from star_attention.hf.progress import Progress
from star_attention.planning.plan import BlockPlan, Span
from star_attention.planning.segments import Segments
from star_attention.planning.windows import dropping, first_kept, kept_by_layer
from star_attention.storage.kv import DEFAULT_FORMAT, ContextKV, KVFormat
from star_attention.storage.oom import translate_oom

T = TypeVar("T")

_WORTH_COMPILING = 4096
"""Fewest tokens of a forward that is compiled.

Compiling takes seconds, and forwards of few tokens wait for launches rather than for the device.
"""


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
        in_turns: True if all ranks pause together between forwards (`planning.turns`).
    """

    handle: ModelHandle
    comm: Comm
    config: StarConfig
    ids_BL: Tensor
    plan: BlockPlan
    layout: tuple[Segments, ...]
    rope_length: int | None = None
    progress: Progress | None = None
    in_turns: bool = False

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
        return self.config.forward_size(self.handle.device.type, self.comm.cp_size)

    @property
    def span_tokens(self) -> int:
        """Most tokens of each context in one forward."""
        return max(1, self.tokens_per_forward // self.contexts)

    @cached_property
    def places(self) -> Places:
        """The layers that store keys and values."""
        return {
            layer: Place(shape=shape, device=self.handle.layer_device(layer))
            for layer, shape in enumerate(self.handle.layer_shapes)
            if shape is not None
        }

    @property
    def kv_format(self) -> KVFormat:
        """The format that the contexts' keys and values are stored in."""
        config = self.config
        return KVFormat(
            dtype=config.kv_dtype,
            device=config.kv_device,
            resident=config.kv_resident,
            windows=config.kv_windows,
        )

    def kept(self, kv_format: KVFormat) -> list[Segments]:
        """Return which of this rank's tokens each layer keeps in a format."""
        tokens, windows = self.plan.context_tokens, self.handle.windows
        return kept_by_layer(self.segments, windows, tokens, kv_format.windows)


Steps = Generator[Span, None, T]
"""Work that pauses after each forward, with the tokens that it encoded, and returns a value."""


def finish(steps: Steps[T]) -> T:
    """Run work without a pause, and return its value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value


def encode(job: EncodeJob, helping: Helping | None = None) -> Steps[list[ContextKV]]:
    """Encode a batch of contexts, block by block.

    Blocks read the anchor as it was computed, whatever format the contexts are stored in.

    Args:
        job: the contexts.
        helping: what rank 0 computes for others; None for nothing.

    Returns:
        This rank's keys and values, one store for each context.

    Raises:
        OutOfMemoryError: the device or the machine has too little memory. Names the size to lower;
            what was allocated is freed.
    """
    plan, comm = job.plan, job.comm
    stores = [
        empty(job.handle, job.segments, comm, job.kv_format, job.kept(job.kv_format))
        for _ in range(job.contexts)
    ]
    if comm.cp_rank >= plan.busy_ranks:
        return stores
    shares_anchor = plan.busy_ranks > 1 and plan.anchor_size > 0
    broadcasts = shares_anchor and job.config.anchor_source == "broadcast"
    receives = shares_anchor and comm.cp_rank > 0
    anchors: list[ContextKV] | None = None
    if receives or (not job.kv_format.as_computed and plan.anchor_size > 0 and plan.num_blocks > 1):
        anchors = _anchor_stores(job, received=receives and broadcasts)
    recents = [Recent() for _ in job.handle.windows]
    link = _link(job, recents, anchors or [], sends_anchor=broadcasts)
    cache = EncodeCache(
        plan, stores, job.handle.windows, comm, anchors=anchors, link=link, recents=recents
    )
    helping = helping or Helping()
    forwards = Forwards(job, helping)
    helping.begin(forwards.one, stores, anchors or stores)
    span = forwards.by_graph(cache, stores)
    if span is not None:
        yield span
        return stores
    try:
        if receives and not broadcasts:
            yield from forwards.steps(cache, anchor_spans(plan, job.span_tokens))
        spans = plan.spans(job.span_tokens, rank=comm.cp_rank)
        yield from forwards.steps(cache, helping.in_order(spans))
    except GeneratorExit:
        # Ranks stop together between two turns: all that was sent has arrived.
        link.finish()
        raise
    link.finish()
    helping.finish()
    return stores


def _link(
    job: EncodeJob, recents: list[Recent], anchors: list[ContextKV], *, sends_anchor: bool
) -> KVLink:
    """Return how keys and values of other ranks arrive at this one.

    Args:
        job: the contexts.
        recents: for each layer, where blocks arrive that are looked back to.
        anchors: where the anchor arrives on ranks other than 0.
        sends_anchor: True if rank 0 sends the anchor.
    """
    plan, comm = job.plan, job.comm
    if plan.busy_ranks > 1 and plan.stripes is not None:
        return StripeLink(
            comm,
            plan,
            job.places,
            job.handle.windows,
            recents=recents,
            anchors=anchors if comm.cp_rank > 0 else [],
            sends_anchor=sends_anchor,
            batch=job.contexts,
        )
    if not sends_anchor:
        return KVLink()
    if comm.cp_rank == 0:
        return AnchorSender(comm, plan)
    return AnchorReceiver(comm, plan, job.places, anchors, span_tokens=job.span_tokens)


def _anchor_stores(job: EncodeJob, *, received: bool) -> list[ContextKV]:
    """Return stores for the anchor as it was computed, one for each context.

    Args:
        job: the contexts.
        received: True if it comes from another rank: of what is out of the window, nothing is kept.
    """
    anchor, kept = Segments.prefix(job.plan.anchor_size), None
    if received:
        first, tokens = job.segments[0][0], job.plan.context_tokens
        kept = [
            Segments(anchor.within(first_kept(first, window), first))
            for window in dropping(job.handle.windows, tokens, job.config.kv_windows)
        ]
    return [empty(job.handle, anchor, job.comm, kept=kept) for _ in range(job.contexts)]


def empty(
    handle: ModelHandle,
    segments: Segments,
    comm: Comm,
    kv_format: KVFormat = DEFAULT_FORMAT,
    kept: list[Segments] | None = None,
) -> ContextKV:
    """Return an empty store for these tokens, or what each layer keeps of them.

    The first forward shows which layers expand what they store. A rank of several may have no
    forward of its own, so they probe the model instead.
    """
    if comm.cp_size == 1:
        return ContextKV.empty(segments, [None] * len(handle.windows), kv_format, kept=kept)
    expands = [None if shape is None else shape.expands for shape in handle.layer_shapes]
    return ContextKV.empty(segments, expands, kv_format, kept=kept)


def anchor_spans(plan: BlockPlan, span_tokens: int) -> Iterator[Span]:
    """Yield the forwards that compute the anchor alone, as pieces of the first block."""
    for start in range(0, plan.anchor_size, span_tokens):
        yield Span(start=start, stop=min(start + span_tokens, plan.anchor_size), block_start=0)


class Forwards:
    """Runs spans of a batch of contexts through the decoder."""

    def __init__(self, job: EncodeJob, helping: Helping | None = None) -> None:
        self._job, self._helping = job, helping or Helping()
        self._usual: int | None = None

    @cached_property
    def _ids(self) -> Tensor:
        """The token ids on the model's device, `[B, L]`."""
        # All at once: a copy from host memory waits for whatever the device has to do before.
        return self._job.ids_BL.to(self._job.handle.device)

    def run(self, cache: SpanCache, spans: Iterable[Span]) -> None:
        """Encode spans in order, without a pause."""
        finish(self.steps(cache, spans))

    def by_graph(self, cache: SpanCache, stores: list[ContextKV]) -> Span | None:
        """Encode whole contexts that are one forward by a CUDA graph, if there is one for them.

        Returns:
            The tokens; None if nothing has happened.

        Raises:
            OutOfMemoryError: with the size to lower.
        """
        job, plan, graphs = self._job, self._job.plan, self._job.handle.graphs
        if graphs is None or plan.context_tokens > job.span_tokens:
            return None
        spans = list(plan.spans(job.span_tokens))
        if len(spans) > 1:
            return None
        cache.span = spans[0]
        mode = None if self._usual_tokens(spans) is None else FULL
        with translate_oom(lambda: self._out_of_memory(cache)):
            if not graphs.of_encoding.run(job.ids_BL, plan, stores, job.comm, compiled_for=mode):
                return None
        if job.progress is not None:
            job.progress(spans[0], plan)
        return spans[0]

    def steps(self, cache: SpanCache, spans: Iterable[Span]) -> Steps[None]:
        """Encode spans in order.

        Raises:
            OutOfMemoryError: with the size to lower.
        """
        job, comm = self._job, self._job.comm
        with translate_oom(lambda: self._out_of_memory(cache)):
            own_tokens = job.segments.tokens
            comm.progress(0, own_tokens)
            done, spans = 0, list(spans)
            self._usual = self._usual_tokens(spans)
            cache.after_layer = self._after_layer(cache)
            for span in spans:
                self.one(cache, span, self._helping.part(span))
                self._helping.after(span)
                done += span.tokens
                comm.progress(done, max(done, own_tokens))
                if job.progress is not None:
                    job.progress(span, job.plan)
                yield span

    def one(self, cache: SpanCache, span: Span, part: LayerPart | None = None) -> None:
        """Run one forward.

        Args:
            cache: where it stores and what it attends to.
            span: its tokens.
            part: the layers that run; None for all.
        """
        job, handle, plan = self._job, self._job.handle, self._job.plan
        cache.span, cache.part = span, part
        if part is not None:
            # Layers that do not run count for `_after_layer`.
            cache.calls += part.first
        job.comm.tick(f"phase 1, tokens {span.start:,} to {span.stop:,} of {plan.context_tokens:,}")
        handle.encode(
            self._ids[:, span.start : span.stop],
            torch.arange(span.start, span.stop, device=handle.device)[None],
            cache,
            job.rope_length,
            compiled_for=FULL if span.tokens == self._usual else None,
            keys_only=part is None or part.is_last,
        )
        cache.part = None

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
        sizes = f"tokens_per_forward (now {job.tokens_per_forward:,}; it sets the working memory)"
        if job.comm.cp_size > 1 and job.plan.lookback and cache.span.tokens > job.span_tokens:
            # The stripe is one block, which other ranks wait for.
            sizes = f"block_size (now {job.plan.block_size:,}; with lookback on ranks a forward"
            sizes += " holds a whole block)"
        return (
            f"out of memory in phase 1 after {cache.span.start:,} of {job.plan.context_tokens:,}"
            f" context tokens, with {cache.span.tokens * job.contexts:,} tokens in one forward:"
            f" lower {sizes}, keep keys and values in fp8 (kv_dtype) or in host memory (kv_device),"
            f" or encode a shorter context ({cache.bytes_per_token:,} bytes per token here)"
        )
