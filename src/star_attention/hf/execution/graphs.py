"""Forwards of few tokens as CUDA graphs: one launch each, without Python's overhead.

A graph is captured once for each number of rows and new tokens. It contains no context data: the
kernels read the addresses and lengths of the keys from tables on the device
(`attention.kernels.triton_answer`), so one graph serves every context, query and step.

Not used: without compiled layers (`ModelHandle.graphs`); length-dependent rotary frequencies,
several devices, no Triton (`can_capture`); several ranks (`Graphs.serve`); MLA, KV in host memory,
streaming_llm, odd head sizes (`can_read`); too many new tokens (`Graphs.bucket`); beams and
assisted decoding (`phase2.stock`); a capture that fails. The forward then runs eagerly.

Axes: R rows, Q new tokens of each row, G KV heads, D head size, H query heads, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import triton_works
from star_attention.attention.state import State
from star_attention.distributed import Comm, SoloComm
from star_attention.errors import UnsupportedModelError
from star_attention.hf.cache.base import ForwardPosition, StarCache, StarLayer, build_layers
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.execution import compiled, hook
from star_attention.hf.loading import identity
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV

_log = logging.getLogger("star_attention")

BUCKETS = (1, 16, 32, 64, 128, 256)
"""New tokens of a row: one, or a query, padded on the left."""
MAX_TOKENS = 512
"""Most new tokens of all rows together. Larger forwards do not wait for launches."""


class TailBuffers:
    """The tails of a cache as the kernels of a graph see them: addresses, room and length.

    A graph appends tokens on the device; `advance` counts them on the host.
    """

    def __init__(self, cache: AnswerCache) -> None:
        self._cache = cache
        # Layers that read another layer's keys have no tail.
        self._layers = [layer for layer in cache.layers if not layer.shard.is_empty]
        # All tails grow and move together; the first layer's stands for them.
        self._first = cache.position.tail

    @property
    def tokens(self) -> int:
        return self._first.length

    @property
    def version(self) -> int:
        """A number that changes whenever the buffers move."""
        return self._first.version

    def capacity(self, rows: int) -> int:
        """Return the tokens for which tails of that many rows have room."""
        return self._first.capacity(rows)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for new tokens in all tails."""
        for layer in self._layers:
            start = layer.shard.segments[0][0]
            k_1G1D, v_1G1D = layer.shard.slice(start, start + 1)
            layer.tail.reserve(*(t.expand(rows, -1, tokens, -1) for t in (k_1G1D, v_1G1D)))

    def advance(self, tokens: int) -> None:
        """Count tokens that a graph has appended."""
        for layer in self._layers:
            layer.tail.length += tokens

    def addressed(self) -> list[tuple[Tensor, ...]]:
        """Return the tensors whose addresses the kernels read, in the order of the table's columns.

        Each layer's context and tail, keys and values each, and scales in fp8; nothing for a layer
        that reads another layer's keys.
        """
        layers: list[tuple[Tensor, ...]] = []
        for layer in self._cache.layers:
            if layer.shard.is_empty:
                layers.append(())
                continue
            k, v, *scales = layer.shard.stored()
            layers.append((k, v, *layer.tail.buffers(), *scales))
        return layers


class _GraphPosition(ForwardPosition):
    """The tables on the device from which captured kernels read where the keys are."""

    def __init__(self, layers: int, device: torch.device) -> None:
        from star_attention.attention.kernels import triton_answer

        super().__init__()
        self.kernel = triton_answer
        self.tables = triton_answer.KVTables.zeros(layers, MAX_TOKENS, device)
        # How the context of the forward that is being captured is stored.
        self.fp8 = False

    @property
    def seen_tokens(self) -> int:
        return 1


class _GraphLayer(StarLayer[_GraphPosition]):
    def set_expands(self, expands: bool) -> None:
        if expands:
            raise UnsupportedModelError(
                "a layer", ["it computes keys and values from the stored ones"]
            )

    def append(self, k_RGQD: Tensor, v_RGQD: Tensor) -> tuple[Tensor, Tensor]:
        position = self.position
        position.kernel.append(k_RGQD, v_RGQD, tables=position.tables, layer=self.index)
        return k_RGQD, v_RGQD

    def attend(self, q_RQHD: Tensor, k_RKGD: Tensor, v_RKGD: Tensor, rule: Rule) -> State:
        position = self.position
        state: State = position.kernel.attend(
            q_RQHD,
            k_RKGD.shape[2],
            tables=position.tables,
            layer=self.index,
            rule=rule,
            fp8=position.fp8,
        )
        return state


class _Graph:
    """One captured forward, and the tensors that it reads and writes."""

    def __init__(self, ids_RQ: Tensor, positions_RQ: Tensor) -> None:
        self.ids_RQ, self.positions_RQ = ids_RQ.clone(), positions_RQ.clone()
        self.replay: Callable[[], None]
        self.logits_RV: Tensor


class Graphs:
    """The captured forwards of one model on one GPU."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        windows = handle.windows
        self._position = _GraphPosition(len(windows), handle.device)
        no_stores = [ContextKV.empty(Segments(), [False] * len(windows))]
        layers = build_layers(_GraphLayer, windows, self._position, no_stores)
        self._cache = StarCache(layers, self._position, SoloComm())
        self._graphs: dict[tuple[int, int, bool], _Graph | None] = {}
        self._pool: Any = None
        self._weights: int | None = None
        self._loaded: tuple[Any, ...] = ()

    def serve(self, shard: ContextKV, comm: Comm) -> bool:
        """Return True if graphs can read a context, stored as the kernel needs it on one GPU."""
        outer = self._handle.outer
        weights = hash(
            (*identity.adapters(outer), *(parameter.data_ptr() for parameter in outer.parameters()))
        )
        # Graphs hold addresses of weights, which may have moved, and know one set of adapters.
        if weights != self._weights:
            self._weights = weights
            self._graphs.clear()
        return comm.size == 1 and can_read(shard, self._handle.device)

    def bucket(self, rows: int, queries: int) -> int | None:
        """Return the tokens to which each of `rows` queries is padded, None if too many."""
        size = next((size for size in BUCKETS if size >= queries), None)
        return None if size is None or rows * size > MAX_TOKENS else size

    def run(self, cache: AnswerCache, ids_RQ: Tensor, positions_RQ: Tensor) -> Tensor | None:
        """Run a forward of new tokens, which are appended to the cache's tail.

        Returns:
            Logits of each row's last token, fp32 `[R, V]`. None if there is no graph for that many
            tokens, or if it cannot be captured: nothing has happened then.
        """
        rows, queries = ids_RQ.shape
        if self.bucket(rows, queries) != queries:
            return None
        with hook.lock_of(self._handle.model):
            tails = TailBuffers(cache)
            if tails.tokens + queries > tails.capacity(rows):
                tails.reserve(rows, queries)
            self._load(cache, tails, rows)
            key = rows, queries, cache.kv_format.dtype == "fp8"
            if key not in self._graphs:
                self._position.fp8 = key[2]
                with cache.comm.working("capturing a CUDA graph"):
                    self._graphs[key] = self._capture_forward(ids_RQ, positions_RQ)
                self._loaded = ()
                self._load(cache, tails, rows)
            graph = self._graphs[key]
            if graph is None:
                return None
            graph.ids_RQ.copy_(ids_RQ)
            graph.positions_RQ.copy_(positions_RQ)
            graph.replay()
            logits_RV = graph.logits_RV.clone()
            tails.advance(queries)
            self._loaded = self._signature(cache, tails, rows)
        return logits_RV

    def _signature(self, cache: AnswerCache, tails: TailBuffers, rows: int) -> tuple[Any, ...]:
        return weakref.ref(cache), tails.version, tails.tokens, rows

    def _load(self, cache: AnswerCache, tails: TailBuffers, rows: int) -> None:
        """Point the graphs at a cache, unless they have just run on it."""
        signature = self._signature(cache, tails, rows)
        if signature == self._loaded:
            return
        tables = self._position.tables
        tables.addresses.copy_(self._position.kernel.addresses(tails.addressed()))
        tables.lengths.copy_(
            torch.tensor([cache.context_tokens, tails.tokens, tails.capacity(rows)])
        )
        tables.padding_R[:rows].copy_(torch.tensor(cache.row_padding(rows), dtype=torch.int32))
        self._loaded = signature

    def _capture_forward(self, ids_RQ: Tensor, positions_RQ: Tensor) -> _Graph | None:
        rows, queries = ids_RQ.shape
        graph = _Graph(ids_RQ, positions_RQ)
        mode = compiled.STEP if rows * queries == 1 else None

        def forward() -> Tensor:
            logits_R1V: Tensor = self._handle.logits(
                graph.ids_RQ,
                graph.positions_RQ,
                self._cache,
                None,
                logits_to_keep=1,
                compiled_for=mode,
            )
            return logits_R1V[:, -1].float()

        def work() -> None:
            graph.logits_RV = forward()
            self._position.tables.lengths[1:2].add_(queries)

        try:
            graph.replay = self._record(work, warm_up=forward)
        except Exception as error:
            # Whatever a model does that cannot be captured, the plain forward can do.
            _log.info("no CUDA graph for %d x %d tokens: %s", rows, queries, error)
            return None
        return graph

    def _record(self, work: Callable[[], None], warm_up: Callable[[], Any]) -> Callable[[], None]:
        """Capture `work`, and return the function that replays it.

        Args:
            work: the forward; it also advances the length of the tail.
            warm_up: the forward alone, which compiles and allocates at its first use.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        current = torch.cuda.current_stream()
        try:
            return _capture(work, self._pool)
        except Exception:
            torch.cuda.set_stream(current)
            _reset_after_broken_capture(self._handle.device, self._pool)
            self._pool = None
            raise


def _capture(work: Callable[[], Any], pool: Any) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _reset_after_broken_capture(device: torch.device, pool: Any) -> None:
    """Restore torch's state: it would keep allocating from the pool, and refuse random numbers."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        # torch may have ended it by itself.
        with suppress(RuntimeError):
            end(device.index or 0, pool)
    # A capture that succeeds ends the broken one for the random number generator.
    scratch = torch.zeros(1, device=device)
    _capture(lambda: scratch.zero_(), None)


def can_capture(handle: Any) -> bool:
    """True if a model's forwards can run as CUDA graphs."""
    devices = {parameter.device for parameter in handle.model.parameters()}
    # Rotary frequencies that depend on the length are recomputed for each length.
    return devices == {handle.device} and not handle.rotaries and triton_works(handle.device)


def can_read(shard: ContextKV, device: torch.device) -> bool:
    """True if all of a context is stored as the kernel reads it."""
    if shard.kv_format.dtype not in (None, "fp8"):
        return False
    layouts = set()
    for layer in shard.layers:
        if layer.expands or len(layer.segments) != 1:
            return False
        if layer.is_empty:
            continue
        k_1GLD, v_1GLD = layer.stored()[:2]
        layouts |= {(t.dtype, t.is_contiguous(), t.device) for t in (k_1GLD, v_1GLD)}
        if k_1GLD.shape != v_1GLD.shape or k_1GLD.shape[3] % 16 or k_1GLD.shape[3] > 256:
            return False
    return len(layouts) == 1 and all(
        contiguous and layout_device == device for _, contiguous, layout_device in layouts
    )
