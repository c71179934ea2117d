"""Forwards of few tokens as CUDA graphs: one launch each, without Python's overhead.

A graph is captured once for each number of rows and new tokens. It contains no context data: the
kernels read the addresses and lengths of the keys from tables on the device
(`attention.kernels.triton_answer`), so one graph serves every context, query and step.

Layers of a context in host memory arrive between graphs: a forward then has one more of these than
such layers (`hf.cache.arrivals`).

On several ranks the collectives are part of the graph. Each rank captures by itself, and a rank
without a graph runs eagerly beside the others: both do the same collectives in the same order.

Not used: without compiled layers (`ModelHandle.graphs`); length-dependent rotary frequencies,
several devices, no Triton, ranks over gloo (`can_capture`, `Graphs.serve`); streaming_llm, odd
head sizes, MLA with weights that are not a plain matrix (`can_read`); too many
new tokens (`Graphs.bucket`); beams and assisted decoding (`phase2.stock`); a capture that fails.
The forward then runs eagerly.

Axes: R rows, Q new tokens of each row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from star_attention.attention.kernels import triton_works
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.arrivals import Arrivals, arriving
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.graph import GraphCache, TailBuffers
from star_attention.hf.cache.latent import Latents, usable
from star_attention.hf.cache.readable import can_read
from star_attention.hf.execution import compiled, hook, row_graphs
from star_attention.hf.execution.capture import Recorder
from star_attention.hf.execution.row_graphs import RowGraphs
from star_attention.storage.kv import ContextKV

if TYPE_CHECKING:
    from star_attention.hf.execution.encode_graphs import EncodeGraphs

BUCKETS = (1, 16, 32, 64, 128, 256)
"""New tokens of a row: one, or a query, padded on the left."""
MAX_TOKENS = 512
"""Most new tokens of all rows together. Larger forwards do not wait for launches."""

Key = tuple[int, int, bool, bool, tuple[str, ...]]
"""A kind of forward: rows, new tokens of each, whether the context is in fp8, whether there are
logits, and the parts of the model that are in slices."""


class _Graph:
    """One captured forward, and the tensors that it reads and writes."""

    def __init__(self, ids_RQ: Tensor, positions_RQ: Tensor) -> None:
        self.ids_RQ, self.positions_RQ = ids_RQ.clone(), positions_RQ.clone()
        # Without logits, a forward returns none of any row.
        self.logits_RV = ids_RQ.new_empty(len(ids_RQ), 0, dtype=torch.float32)
        self.replay: Callable[[], None]


class _Captures:
    """The graphs that hold the collectives of one communicator."""

    def __init__(self, cache: GraphCache) -> None:
        self.cache = cache
        self.transport_version = cache.comm.transport_version
        self.graphs: dict[Key, _Graph | None] = {}


class Graphs:
    """The captured forwards of one model on one GPU.

    Args:
        handle: the `ModelHandle` of the model.
        recorder: captures the graphs; None for a new one.
    """

    def __init__(self, handle: Any, recorder: Recorder | None = None) -> None:
        self._handle = handle
        self.recorder = recorder or Recorder(handle)
        self._captures: dict[tuple[Comm, tuple[int, ...]], _Captures] = {}
        self._validity = self.recorder.validity()
        self._readable: WeakKeyDictionary[ContextKV, tuple[torch.device, bool]]
        self._readable = WeakKeyDictionary()

    @cached_property
    def of_rows(self) -> RowGraphs:
        """Decode forwards of many rows, whose contexts differ."""
        return RowGraphs(self._handle, self.recorder)

    @cached_property
    def of_encoding(self) -> EncodeGraphs:
        """Forwards that encode short contexts."""
        from star_attention.hf.execution.encode_graphs import EncodeGraphs

        return EncodeGraphs(self._handle, self.recorder)

    @property
    def captured(self) -> dict[Key, bool]:
        """True for kinds of forwards that were captured, False for those that could not be."""
        return {
            key: graph is not None
            for captures in self._captures.values()
            for key, graph in captures.graphs.items()
        }

    def look(self) -> None:
        """Drop what was captured of a model whose weights have moved since."""
        if self._validity.has_ended():
            self._captures.clear()

    def serve(self, shard: ContextKV, comm: Comm) -> bool:
        """Return True if graphs can read this rank's shard of a context; a `look` comes before.

        Another rank may decide otherwise: its forwards have the same collectives.
        """
        if not self.runs_on(comm):
            return False
        latents, device, shapes = self._latents(), self._handle.device, self._handle.layer_shapes
        if latents is not None:
            # Which modules expand what is stored, and how, may change.
            has_windows = any(window is not None for window in self._handle.windows)
            return not has_windows and can_read(shard, shapes, device, latents)
        # Each answer would ask every layer again.
        known = self._readable.get(shard)
        if known is None or known[0] != device:
            known = self._readable[shard] = device, can_read(shard, shapes, device)
        return known[1]

    def runs_on(self, comm: Comm) -> bool:
        """Return True if graphs can hold the collectives of these ranks."""
        # Those over gloo wait on the host.
        return comm.size == 1 or comm.is_asynchronous

    def _latents(self) -> Latents | None:
        """Return of each layer the attention that need not expand, None if no layer expands."""
        probed = self._handle.probe_result
        expands = any(shape is not None and shape.expands for shape in probed.layer_shapes)
        return usable(probed.latents) if expands else None

    def bucket(self, rows: int, queries: int) -> int | None:
        """Return the tokens to which each of `rows` queries is padded, None if too many."""
        size = next((size for size in BUCKETS if size >= queries), None)
        if size is None or rows * size > MAX_TOKENS or size > self._most_queries:
            return None
        return size

    @cached_property
    def _most_queries(self) -> int:
        """Most new tokens of a row: with more, expanding a context once is less work."""
        known = [latent.most_queries for latent in self._handle.probe_result.latents if latent]
        return min(known, default=MAX_TOKENS)

    def run(
        self, cache: AnswerCache, ids_RQ: Tensor, positions_RQ: Tensor, *, logits: bool = True
    ) -> Tensor | None:
        """Run a forward of new tokens, which are appended to the cache's tail.

        Args:
            cache: the cache of the answer.
            ids_RQ: token ids.
            positions_RQ: their positions.
            logits: compute logits, which ranks other than 0 may not need.

        Returns:
            Logits of each row's last token, fp32 `[R, V]`, or `[R, 0]` without logits. None if
            there is no graph for that many tokens, or if it cannot be captured: nothing has
            happened then.
        """
        rows, queries = ids_RQ.shape
        if self.bucket(rows, queries) != queries:
            return None
        with hook.lock_of(self._handle.model):
            captures = self._captures_of(cache)
            tables = captures.cache
            tails = TailBuffers(cache, self._handle.layer_shapes, self._handle.device)
            if tails.tokens + queries > tails.capacity(rows):
                tails.reserve(rows, queries)
            tables.load(cache, tails, rows)
            sliced = () if cache.slices is None else cache.slices.parts
            key = rows, queries, cache.kv_format.dtype == "fp8", logits, sliced
            if key not in captures.graphs:
                tables.prepare_capture(cache, queries)
                with cache.comm.working("capturing a CUDA graph"):
                    captures.graphs[key] = self._capture_forward(
                        tables, ids_RQ, positions_RQ, logits=logits
                    )
                tables.forget()
                tables.load(cache, tails, rows)
            graph = captures.graphs[key]
            if graph is None:
                return None
            cache.begin(ids_RQ, positions_RQ, 1)
            graph.ids_RQ.copy_(ids_RQ)
            graph.positions_RQ.copy_(positions_RQ)
            graph.replay()
            logits_RV = graph.logits_RV.clone()
            tails.advance(queries)
            tables.ran(cache, tails, rows)
        return logits_RV

    def _captures_of(self, cache: AnswerCache) -> _Captures:
        """Return the graphs with a cache's collectives, between which its layers arrive.

        None of them has collectives of groups that failed.
        """
        comm, layers = cache.comm, arriving([layer.shard for layer in cache.layers])
        captures = self._captures.get((comm, layers))
        if captures is None or captures.transport_version != comm.transport_version:
            handle, arrivals = self._handle, Arrivals(layers, self.recorder.interlude)
            tables = GraphCache(handle.windows, MAX_TOKENS, handle.device, comm, arrivals)
            captures = self._captures[comm, layers] = _Captures(tables)
        return captures

    def _mode(self, cache: GraphCache, rows: int, queries: int) -> str | None:
        """Return the mode of the compiled layers of a forward, None for layers as they are."""
        if queries == 1:
            return compiled.STEP if rows == 1 else row_graphs.MODE
        layers = self._handle.compiled
        # In pieces, code for any length computes rotary embeddings slowly (`compiled`).
        whole = layers is not None and layers.way(cache) != hook.OVER
        return compiled.QUERY if rows == 1 and whole else None

    def _capture_forward(
        self, cache: GraphCache, ids_RQ: Tensor, positions_RQ: Tensor, *, logits: bool
    ) -> _Graph | None:
        rows, queries = ids_RQ.shape
        graph = _Graph(ids_RQ, positions_RQ)
        mode = self._mode(cache, rows, queries)
        inputs = graph.ids_RQ, graph.positions_RQ, cache, None

        def forward(mode: str | None) -> None:
            if logits:
                logits_R1V: Tensor = self._handle.logits(*inputs, compiled_for=mode)
                graph.logits_RV = logits_R1V[:, -1].float()
            else:
                self._handle.encode(*inputs, logits_to_keep=1, compiled_for=mode)

        replay = self.recorder.try_record(
            forward,
            mode=mode,
            after=lambda: cache.position.tables.lengths[:, 1].add_(queries),
            comm=cache.comm,
            subject=f"{rows} x {queries} tokens",
        )
        if replay is None:
            return None
        graph.replay = replay
        return graph


def can_capture(handle: Any) -> bool:
    """True if a model's forwards can run as CUDA graphs."""
    devices = {parameter.device for parameter in handle.model.parameters()}
    # Rotary frequencies that depend on the length are recomputed for each length.
    return devices == {handle.device} and not handle.rotaries and triton_works(handle.device)
