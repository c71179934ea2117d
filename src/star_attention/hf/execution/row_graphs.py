"""Decode steps of many rows as CUDA graphs: one launch each, whichever rows they are.

A graph is captured once for each bucket of rows and each number of rows that read a context
together. It contains no data of rows: the kernel reads the addresses and lengths of their keys from
tables on the device (`attention.kernels.row_tables`), which are filled when rows come or go.

On several ranks the collectives are part of the graph. A forward has other sizes there than one
without a graph, so that all ranks run it by graphs, or none does (`hf.execution.rows`).

Layers of contexts in host memory arrive between graphs, of which a forward then has more than one.

Not used: without CUDA graphs (`ModelHandle.graphs`); ranks over gloo; streaming_llm, MLA, odd head
sizes (`RowBuffers.can_read`); on one rank contexts in several
segments, on several ranks sliding windows; more rows than the largest bucket; a capture that fails.
The forward then runs eagerly.

Axes: R rows of a bucket, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.kernels.row_tables import RowTables, most_items
from star_attention.distributed.comm import Comm
from star_attention.distributed.solo import SoloComm
from star_attention.hf.cache.arrivals import Arrivals, arriving
from star_attention.hf.cache.row_graph import RowBuffers, RowGraphCache
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution import compiled, hook, slices
from star_attention.hf.execution.capture import Recorder
from star_attention.storage.kv import ContextKV
from star_attention.storage.transfers import send

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of a graph. Unused ones cost little, since weights are read once for all rows, and each
bucket takes a capture."""

MODE: str | None = compiled.ROWS
"""Mode of the compiled layers in graphs of several rows, None for layers as they are."""

Key = tuple[int, int, bool]
"""A kind of forward: rows of the bucket, rows of a tile, and whether contexts are in fp8."""
_Where = tuple[Comm, int, tuple[str, ...], tuple[int, ...]]
"""The ranks, the version of their transport, the parts of the model that are in slices, and the
layers that arrive from host memory."""


def bucket_of(rows: int) -> int | None:
    """Return the bucket of so many rows; None for more than the largest one."""
    return next((size for size in BUCKETS if size >= rows), None)


class _RowGraph:
    """One captured forward, and the tensors that it reads and writes."""

    def __init__(self, cache: RowGraphCache, ids_R1: Tensor) -> None:
        self.cache, self.ids_R1 = cache, ids_R1
        # Without logits, a forward returns none of any row.
        self.logits_RV = ids_R1.new_empty(len(ids_R1), 0, dtype=torch.float32)
        self.replay: Callable[[], None]


class RowGraphs:
    """The captured decode steps of one model's rows.

    Args:
        handle: the `ModelHandle` of the model.
        recorder: captures the graphs.
    """

    def __init__(self, handle: Any, recorder: Recorder) -> None:
        self._handle, self._recorder = handle, recorder
        self._buffers: dict[bool, RowBuffers] = {}
        self._graphs: dict[_Where, dict[Key, _RowGraph | None]] = {}
        self._validity = recorder.validity()
        # The rows of the last forward, and their kind.
        self._rows: weakref.ref[RowSet] | None = None
        self._key: Key | None = None
        self._arriving: tuple[int, ...] = ()

    @property
    def captured(self) -> dict[Key, bool]:
        """True for kinds of forwards that were captured, False for those that could not be."""
        return {
            key: graph is not None
            for graphs in self._graphs.values()
            for key, graph in graphs.items()
        }

    def can_run(self, rows: RowSet, comm: Comm, sliced: tuple[str, ...] = ()) -> bool:
        """Return True if there is a graph for these rows, which may be captured now."""
        with hook.lock_of(self._handle.model):
            return self._graph_for(rows, comm, sliced) is not None

    def run(
        self,
        rows: RowSet,
        tokens_R: Tensor,
        comm: Comm,
        wanted: list[int] | None = None,
        sliced: tuple[str, ...] = (),
    ) -> Tensor | None:
        """Run a forward of each row's newest token, which joins its tail. Collective.

        Args:
            rows: the rows.
            tokens_R: their tokens, on the device.
            comm: the ranks, each with its shard of every context.
            wanted: rows whose logits are wanted, None for all.
            sliced: parts of the model whose weights ranks multiply in slices.

        Returns:
            Logits of the tokens that follow, fp32 `[rows wanted, V]`, or `[R, 0]` on ranks that
            compute none. None if there is no graph for these rows: nothing has happened then.
        """
        with hook.lock_of(self._handle.model):
            graph = self._graph_for(rows, comm, sliced)
            if graph is None:
                return None
            buffers = self._buffers_of(comm)
            buffers.reserve(rows)
            graph.cache.load(rows, buffers)
            graph.ids_R1[: len(rows)].copy_(tokens_R[:, None])
            graph.replay()
            logits_RV = graph.logits_RV[: len(rows)]
            if wanted is not None:
                logits_RV = logits_RV[send(wanted, logits_RV.device)]
            # The next replay writes over it.
            logits_RV = logits_RV.to(torch.float32, copy=True)
            buffers.advance(rows)
            graph.cache.ran(rows)
        return logits_RV

    def usual(self, shard: ContextKV, most_rows: int) -> list[Key]:
        """Return the kinds of forwards of up to so many rows on whole contexts like this one."""
        buffers = self._buffers_of(SoloComm())
        if not buffers.reads(shard):
            return []
        largest = bucket_of(min(most_rows, BUCKETS[-1]))
        fp8 = shard.kv_format.dtype == "fp8"
        return [
            (bucket, tile_rows, fp8)
            for bucket in BUCKETS
            if bucket <= (largest or 0)
            for tile_rows in sorted({buffers.tile_of(n + 1) for n in range(bucket)})
        ]

    @torch.no_grad()
    def prepare(self, key: Key, shard: ContextKV, comm: Comm) -> None:
        """Capture a kind of forward of whole weights, unless that was done or tried before.

        Args:
            key: the kind.
            shard: a context of its rows; those of others arrive from host memory as its do.
            comm: the ranks.
        """
        with hook.lock_of(self._handle.model):
            self._drop_void()
            self._graph_of(key, comm, (), arriving(shard.layers))

    def _buffers_of(self, comm: Comm) -> RowBuffers:
        is_part = comm.size > 1
        if is_part not in self._buffers:
            handle = self._handle
            self._buffers[is_part] = RowBuffers(handle.probe_result, handle.device, is_part=is_part)
        return self._buffers[is_part]

    def _graph_for(self, rows: RowSet, comm: Comm, sliced: tuple[str, ...]) -> _RowGraph | None:
        key = self._key_of(rows, comm)
        return None if key is None else self._graph_of(key, comm, sliced, self._arriving)

    def _graph_of(
        self, key: Key, comm: Comm, sliced: tuple[str, ...], layers: tuple[int, ...]
    ) -> _RowGraph | None:
        where = comm, comm.transport_version, sliced, layers
        if where not in self._graphs:
            # Those with collectives of groups that failed are of no use.
            self._graphs = {
                other: graphs
                for other, graphs in self._graphs.items()
                if other[0] is not comm or other[1] == comm.transport_version
            }
            self._graphs[where] = {}
        graphs = self._graphs[where]
        if key not in graphs:
            with comm.working("capturing a CUDA graph"):
                graphs[key] = self._capture(key, comm, sliced, layers)
        return graphs[key]

    def _drop_void(self) -> None:
        if self._validity.has_ended():
            self._graphs.clear()

    def _key_of(self, rows: RowSet, comm: Comm) -> Key | None:
        """Return the kind of a forward, None if no graph can serve it."""
        if self._rows is not None and self._rows() is rows:
            return self._key
        self._drop_void()
        bucket = bucket_of(len(rows))
        self._rows, self._key = weakref.ref(rows), None
        buffers = self._buffers_of(comm)
        if comm.size > 1 and any(self._handle.windows):
            # The kernel knows no positions in a part of a context.
            return None
        if bucket is not None and buffers.can_read(rows):
            fp8 = rows.rows[0].shard.kv_format.dtype == "fp8"
            self._key = bucket, buffers.tile_rows(rows), fp8
            shards = [rows.rows[start].shard for start, _ in rows.groups]
            self._arriving = tuple(sorted({n for shard in shards for n in arriving(shard.layers)}))
        return self._key

    def _capture(
        self, key: Key, comm: Comm, sliced: tuple[str, ...], layers: tuple[int, ...]
    ) -> _RowGraph | None:
        bucket, tile_rows, fp8 = key
        handle, device = self._handle, self._handle.device
        items = most_items(bucket, self._buffers_of(comm).kv_heads)
        tables = RowTables.zeros(len(handle.windows), bucket, items, device)
        own = slices.of(handle, sliced, comm)
        arrivals = Arrivals(layers, self._recorder.interlude)
        cache = RowGraphCache(handle.windows, tables, tile_rows, fp8, comm, arrivals, own)
        graph = _RowGraph(cache, torch.zeros(bucket, 1, dtype=torch.int64, device=device))
        has_logits = comm.rank == 0 or (own is not None and own.has_head)

        def forward(mode: str | None) -> None:
            inputs = graph.ids_R1, cache.positions, cache, None
            if has_logits:
                graph.logits_RV = handle.logits(*inputs, compiled_for=mode)[:, -1]
            else:
                handle.encode(*inputs, logits_to_keep=1, compiled_for=mode)

        replay = self._recorder.try_record(
            forward,
            mode=compiled.STEP if bucket == 1 else MODE,
            after=cache.advance,
            comm=comm,
            subject=f"{bucket} rows",
        )
        if replay is None:
            return None
        graph.replay = replay
        return graph
