"""Phase 1: encode a context block by block, each block attending to itself and to the anchor (paper, section 2.1).

Every context token goes through the linear layers once: the anchor's keys and values do not depend on who looks at them,
so they are shared instead of being computed again for each block. On several ranks each encodes its own blocks, and rank 0,
which holds the anchor, sends it to the others layer by layer. Axes: B contexts, L tokens of each, S tokens of a forward.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from star_attention.distributed.comm import Comm, Pending
from star_attention.hf.cache.base import AnchorLink, EncodeCache, SpanCache
from star_attention.hf.cache.probe import LayerKVShape
from star_attention.hf.execution.compiled import FULL
from star_attention.hf.execution.handle import ModelHandle
from star_attention.planning.plan import BlockPlan, Span
from star_attention.planning.segments import Segments
from star_attention.storage.kv import DEFAULT_FORMAT, ContextKV, KVFormat
from star_attention.storage.oom import translate_oom

Progress = Callable[[Span, BlockPlan], None]
"""Called after each forward with what it encoded."""

_WORTH_COMPILING = 4096
"""Tokens of a forward; compiling takes seconds, and few tokens wait for launches rather than for the device."""

_AHEAD = 2
"""Layers for which a rank has asked for the anchor before it needs it: enough for the transfer to hide behind attention."""


def encode(
    handle: ModelHandle,
    ids_BL: Tensor,
    plan: BlockPlan,
    comm: Comm,
    *,
    tokens_per_forward: int,
    rope_length: int | None = None,
    anchor_source: str = "broadcast",
    kv_format: KVFormat = DEFAULT_FORMAT,
    progress: Progress | None = None,
) -> list[ContextKV]:
    """This rank's keys and values of B contexts of equal length, encoded as one batch.

    kv_format: how they are stored; blocks look at the anchor as it was computed all the same.

    anchor_source: "broadcast" (from rank 0) or "local" (every rank computes the anchor once more, and none communicates).

    Raises `OutOfMemoryError`, with the size to lower, when the device or the machine has too little memory; what was
    allocated is freed with it.
    """
    B = ids_BL.shape[0]
    stores = [empty(handle, plan.layout[comm.cp_rank], comm, kv_format) for _ in range(B)]
    # One batch of contexts shares the forward's budget.
    budget = max(1, tokens_per_forward // B)
    forwards = Forwards(handle, ids_BL, plan, comm, tokens_per_forward, rope_length, progress)
    if comm.cp_rank >= plan.busy_ranks:
        return stores
    shares = plan.busy_ranks > 1 and plan.anchor_size > 0
    anchors: list[ContextKV] | None = None
    link: AnchorLink | None = None
    before: Iterator[Span] = iter(())
    if shares and comm.cp_rank == 0 and anchor_source == "broadcast":
        link = _Sender(comm, plan)
    if (shares and comm.cp_rank > 0) or (
        not kv_format.as_computed and plan.anchor_size and plan.num_blocks > 1
    ):
        anchors = [empty(handle, Segments.prefix(plan.anchor_size), comm) for _ in range(B)]
    if shares and comm.cp_rank > 0:
        assert anchors is not None
        if anchor_source == "broadcast":
            link = _Receiver(handle, comm, plan, anchors, budget)
        else:
            before = anchor_spans(plan, budget)
    cache = EncodeCache(plan, stores, handle.windows, comm, anchors=anchors, link=link)
    for spans in (before, plan.spans(budget, rank=comm.cp_rank)):
        forwards.run(cache, spans)
    if isinstance(link, _Sender):
        link.finish()
    return stores


def extend(
    handle: ModelHandle,
    ids_L: Tensor,
    plan: BlockPlan,
    comm: Comm,
    kv: ContextKV,
    *,
    start: int,
    owner: int,
    tokens_per_forward: int,
    rope_length: int | None = None,
    progress: Progress | None = None,
) -> ContextKV:
    """Go on from token `start` in what holds everything before it: `owner`, the rank that holds the last token, does.

    The other ranks keep what they have; rank 0 sends the owner the anchor once more.
    """
    anchors = None
    if owner > 0 and plan.anchor_size:
        anchors = [_handed_anchor(handle, comm, kv, plan.anchor_size, owner)]
    if comm.cp_rank != owner:
        return kv
    store = kv.grown(kv.segments.grow_to(plan.context_tokens))
    cache = EncodeCache(plan, [store], handle.windows, comm, anchors=anchors)
    forwards = Forwards(handle, ids_L[None], plan, comm, tokens_per_forward, rope_length, progress)
    forwards.run(cache, plan.from_token(start, tokens_per_forward))
    return store


def empty(
    handle: ModelHandle, held: Segments, comm: Comm, kv_format: KVFormat = DEFAULT_FORMAT
) -> ContextKV:
    """Room for a rank's share. Whether layers expand what they keep shows in the first forward, which a rank may not have."""
    if comm.cp_size == 1:
        return ContextKV.empty(held, [None] * len(handle.windows), kv_format)
    return ContextKV.empty(
        held, [None if kept is None else kept.expands for kept in handle.kept], kv_format
    )


def anchor_spans(plan: BlockPlan, budget: int) -> Iterator[Span]:
    """The forwards that compute the anchor alone, as pieces of the first block."""
    for start in range(0, plan.anchor_size, budget):
        yield Span(start=start, stop=min(start + budget, plan.anchor_size), block_start=0)


class Forwards:
    """Runs spans of one batch of contexts through the decoder."""

    def __init__(
        self,
        handle: ModelHandle,
        ids_BL: Tensor,
        plan: BlockPlan,
        comm: Comm,
        tokens_per_forward: int,
        rope_length: int | None,
        progress: Progress | None,
    ) -> None:
        self._handle, self._ids_BL, self._plan, self._comm = handle, ids_BL, plan, comm
        self._tokens_per_forward, self._rope_length, self._progress = (
            tokens_per_forward,
            rope_length,
            progress,
        )

    def run(self, cache: SpanCache, spans: Iterable[Span]) -> None:
        handle, plan = self._handle, self._plan
        with translate_oom(lambda: self._out_of_memory(cache)):
            held = plan.layout[self._comm.cp_rank].tokens
            self._comm.progress(0, held)
            done, spans = 0, list(spans)
            usual = self._usual_tokens(spans)
            for span in spans:
                cache.span = span
                self._comm.tick(
                    f"phase 1, tokens {span.start:,} to {span.stop:,} of {plan.context_tokens:,}"
                )
                positions_1S = torch.arange(span.start, span.stop, device=handle.device)[None]
                ids_BS = self._ids_BL[:, span.start : span.stop].to(handle.device)
                what = FULL if span.tokens == usual else None
                handle.encode(ids_BS, positions_1S, cache, self._rope_length, what=what)
                done += span.tokens
                self._comm.progress(done, max(done, held))
                if self._progress is not None:
                    self._progress(span, plan)

    def _usual_tokens(self, spans: list[Span]) -> int | None:
        """Length for which compiling layers pays: of most forwards, or of the largest that there are. Others are as they are."""
        batch = self._ids_BL.shape[0]
        counts = Counter(span.tokens for span in spans if span.tokens * batch >= _WORTH_COMPILING)
        for tokens, count in counts.most_common(1):
            if count > 1 or tokens * batch == self._tokens_per_forward:
                return tokens
        return None

    def _out_of_memory(self, cache: SpanCache) -> str:
        return (
            f"out of memory in phase 1 after {cache.span.start:,} of {self._plan.context_tokens:,} context tokens, with"
            f" {cache.span.tokens * self._ids_BL.shape[0]:,} tokens in one forward: lower tokens_per_forward (now"
            f" {self._tokens_per_forward:,}; it sets the working memory), keep keys and values in fp8 (kv_dtype) or in the host's"
            f" memory (kv_device), or encode a shorter context (they take {cache.bytes_per_token:,} bytes a token here)"
        )


# ------------------------------------------------------------------------------------------------- the anchor's way


class _Sender(AnchorLink):
    """Rank 0: sends each layer's share of the anchor as soon as it is kept, and does not wait for it."""

    def __init__(self, comm: Comm, plan: BlockPlan) -> None:
        self._comm, self._plan = comm, plan
        self._under_way: list[Pending] = []

    def kept(self, layer: int, span: Span, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        tokens = min(span.stop, self._plan.anchor_size) - span.start
        if tokens > 0:
            packed = _packed(k_BGSD[:, :, :tokens], v_BGSD[:, :, :tokens])
            self._under_way.append(self._comm.broadcast(packed, self._plan.busy_ranks))

    def finish(self) -> None:
        for pending in self._under_way:
            pending.wait()


class _Receiver(AnchorLink):
    """Other ranks: ask for the anchor a few layers ahead, in the order in which rank 0 sends."""

    def __init__(
        self,
        handle: ModelHandle,
        comm: Comm,
        plan: BlockPlan,
        anchors: list[ContextKV],
        budget: int,
    ) -> None:
        self._handle, self._comm, self._plan, self._anchors = handle, comm, plan, anchors
        layers = [layer for layer, kept in enumerate(handle.kept) if kept is not None]
        shares = [
            (span.start, min(span.stop, plan.anchor_size) - span.start)
            for span in plan.spans(budget, rank=0)
            if span.start < plan.anchor_size
        ]
        self._to_ask = deque((layer, *share) for share in shares for layer in layers)
        self._under_way: deque[tuple[int, int, int, Tensor, Pending]] = deque()

    def needed(self, layer: int) -> None:
        if not (self._to_ask or self._under_way):
            return
        # Shares of the anchor come one after the other, all layers of each: up to the last share of this layer.
        last = max(
            (at for at, (asked, *_) in enumerate(self._to_ask) if asked == layer), default=-1
        )
        for _ in range(min(last + 1 + _AHEAD, len(self._to_ask))):
            self._ask()
        while any(asked == layer for asked, *_ in self._under_way):
            asked, start, tokens, packed, pending = self._under_way.popleft()
            pending.wait()
            kept = self._handle.kept[asked]
            assert kept is not None
            k_BGSD, v_BGSD = _unpacked(packed, kept, len(self._anchors), tokens)
            for store, k_GSD, v_GSD in zip(self._anchors, k_BGSD, v_BGSD, strict=True):
                store.layers[asked].write(start, k_GSD, v_GSD)

    def _ask(self) -> None:
        layer, start, tokens = self._to_ask.popleft()
        kept = self._handle.kept[layer]
        assert kept is not None
        packed = torch.empty(
            len(self._anchors) * tokens * kept.numbers,
            dtype=kept.dtype,
            device=self._handle.layer_device(layer),
        )
        self._under_way.append(
            (layer, start, tokens, packed, self._comm.broadcast(packed, self._plan.busy_ranks))
        )


def _handed_anchor(
    handle: ModelHandle, comm: Comm, kv: ContextKV, anchor_size: int, owner: int
) -> ContextKV:
    """Rank 0's anchor on the owner, where it is needed for a while; called by all ranks."""
    anchor = empty(handle, Segments.prefix(anchor_size), comm)
    for layer, kept in enumerate(handle.kept):
        if kept is None:
            continue
        size, device = anchor_size * kept.numbers, handle.layer_device(layer)
        packed = torch.empty(size if comm.cp_rank == owner else 0, dtype=kept.dtype, device=device)
        sent = torch.empty(0, dtype=kept.dtype, device=device)
        if comm.cp_rank == 0:
            sent = _packed(*kv.layers[layer].slice(0, anchor_size))
        comm.exchange(sent, packed, target=owner, source=0, total=size).wait()
        if comm.cp_rank == owner:
            k_1GSD, v_1GSD = _unpacked(packed, kept, 1, anchor_size)
            anchor.layers[layer].write(0, k_1GSD[0], v_1GSD[0])
    return anchor


def _packed(k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    return torch.cat([k_BGSD.reshape(-1), v_BGSD.reshape(-1)])


def _unpacked(packed: Tensor, kept: LayerKVShape, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    keys = batch * tokens * kept.k_heads * kept.k_size
    return (
        packed[:keys].reshape(batch, kept.k_heads, tokens, kept.k_size),
        packed[keys:].reshape(batch, kept.v_heads, tokens, kept.v_size),
    )
