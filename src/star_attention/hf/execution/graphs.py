"""Forwards of few tokens as CUDA graphs: launched whole, they cost what the device needs and not what Python does.

A graph is captured once for a number of rows and new tokens. Where a context's and a tail's keys lie and how many there are, it
reads on the device (`attention.kernels.triton_answer`), so that it serves every context, query and step.

Axes: R rows, Q new tokens of each, G KV heads, V vocabulary.
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
from star_attention.hf.cache.base import AnswerCache, StarCache, _Place, _StarLayer
from star_attention.hf.execution import compiled, hook
from star_attention.hf.loading import identity
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, LayerKV

_log = logging.getLogger("star_attention")

BUCKETS = (1, 16, 32, 64, 128, 256)
"""New tokens a row: one, or a query's, filled up from the left."""
MOST_TOKENS = 512
"""Of all rows together; above, launches are no longer what a forward waits for."""


class _GraphPlace(_Place):
    seen_tokens = 1

    def __init__(self, layers: int, device: torch.device) -> None:
        from star_attention.attention.kernels import triton_answer

        self.kernel = triton_answer
        self.table = torch.zeros(layers, triton_answer.COLUMNS, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(triton_answer.LENGTHS, dtype=torch.int64, device=device)
        self.padding_R = torch.zeros(MOST_TOKENS, dtype=torch.int32, device=device)
        self.fp8 = False  # how the context of the forward that is being captured is stored


class _GraphLayer(_StarLayer):
    place: _GraphPlace

    def __init__(self, index: int, place: _GraphPlace, window: int | None) -> None:
        super().__init__(index, place, window)
        self._kv = LayerKV(Segments(), expands=False)

    @property
    def kv(self) -> LayerKV:
        return self._kv

    def learn(self, *, expands: bool) -> None:
        if expands:
            raise UnsupportedModelError(
                "a layer", ["it computes keys and values from what is kept"]
            )

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        place = self.place
        place.kernel.append(
            k_BGSD, v_BGSD, table=place.table, lengths=place.lengths, layer=self.index
        )
        return k_BGSD, v_BGSD

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        place = self.place
        state: State = place.kernel.attend(
            q_BQHD,
            k_BKGD.shape[2],
            table=place.table,
            lengths=place.lengths,
            padding_R=place.padding_R,
            layer=self.index,
            scale=rule.scale,
            window=rule.window,
            softcap=rule.softcap,
            dtype=rule.dtype or torch.float32,
            fp8=place.fp8,
        )
        return state


class _Graph:
    """One captured forward and the tensors that it reads and writes."""

    def __init__(self, ids_RQ: Tensor, positions_RQ: Tensor) -> None:
        self.ids_RQ, self.positions_RQ = ids_RQ.clone(), positions_RQ.clone()
        self.replay: Callable[[], None]
        self.logits_RV: Tensor


class Graphs:
    """The captured forwards of one model on one GPU."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._place = _GraphPlace(len(handle.windows), handle.device)
        layers = [
            _GraphLayer(index, self._place, window) for index, window in enumerate(handle.windows)
        ]
        self._cache = StarCache(layers, self._place, SoloComm())
        self._graphs: dict[tuple[int, int, bool], _Graph | None] = {}
        self._pool: Any = None
        self._weights: int | None = None
        self._loaded: tuple[Any, ...] = ()

    def serve(self, shard: ContextKV, comm: Comm) -> bool:
        """Whether they serve a context: it lies as the kernel reads it, on this GPU alone."""
        outer = self._handle.outer
        weights = hash(
            (*identity.adapters(outer), *(parameter.data_ptr() for parameter in outer.parameters()))
        )
        if weights != self._weights:  # moved, or other adapters: graphs hold addresses
            self._weights = weights
            self._graphs.clear()
        return comm.size == 1 and _fits(shard, self._handle.device)

    def bucket(self, rows: int, queries: int) -> int | None:
        """To how many tokens each of `rows` queries is best filled up; None for too many."""
        size = next((size for size in BUCKETS if size >= queries), None)
        return None if size is None or rows * size > MOST_TOKENS else size

    def run(self, cache: AnswerCache, ids_RQ: Tensor, positions_RQ: Tensor) -> Tensor | None:
        """A forward of new tokens, kept in the cache's tail: logits of the last one of each row, fp32 `[R, V]`.

        None where there is no graph for so many, or it could not be captured: nothing has happened then.
        """
        rows, queries = ids_RQ.shape
        if self.bucket(rows, queries) != queries:
            return None
        with hook.lock_of(self._handle.model):
            if cache.tail_tokens + queries > cache.tail_capacity(rows):
                cache.reserve(rows, queries)
            self._load(cache, rows)
            key = rows, queries, cache.kv_format.dtype is not None
            if key not in self._graphs:
                self._place.fp8 = key[2]
                self._graphs[key] = self._captured(ids_RQ, positions_RQ)
                self._loaded = ()
                self._load(cache, rows)
            graph = self._graphs[key]
            if graph is None:
                return None
            graph.ids_RQ.copy_(ids_RQ)
            graph.positions_RQ.copy_(positions_RQ)
            graph.replay()
            logits_RV = graph.logits_RV.clone()
            cache.appended(queries)
            self._loaded = self._signature(cache, rows)
        return logits_RV

    def _signature(self, cache: AnswerCache, rows: int) -> tuple[Any, ...]:
        return weakref.ref(cache), cache.version, cache.tail_tokens, rows

    def _load(self, cache: AnswerCache, rows: int) -> None:
        """Point the graphs at a cache; where they have just run on it, they are there already."""
        signature = self._signature(cache, rows)
        if signature == self._loaded:
            return
        place = self._place
        place.table.copy_(place.kernel.addresses(cache.held()))
        place.lengths.copy_(
            torch.tensor([cache.context_tokens, cache.tail_tokens, cache.tail_capacity(rows)])
        )
        place.padding_R[:rows].copy_(torch.tensor(cache.row_padding(rows), dtype=torch.int32))
        self._loaded = signature

    def _captured(self, ids_RQ: Tensor, positions_RQ: Tensor) -> _Graph | None:
        rows, queries = ids_RQ.shape
        graph = _Graph(ids_RQ, positions_RQ)
        what = compiled.STEP if rows * queries == 1 else None

        def forward() -> Tensor:
            logits_R1V: Tensor = self._handle.logits(
                graph.ids_RQ, graph.positions_RQ, self._cache, None, keep=1, what=what
            )
            return logits_R1V[:, -1].float()

        def work() -> None:
            graph.logits_RV = forward()
            self._place.lengths[1:2].add_(queries)

        try:
            graph.replay = self._record(work, warm_up=forward)
        except Exception as error:  # whatever a model does that cannot be captured; the plain forward does it as well
            _log.info("no CUDA graph for %d x %d tokens: %s", rows, queries, error)
            return None
        return graph

    def _record(self, work: Callable[[], None], warm_up: Callable[[], Any]) -> Callable[[], None]:
        """Capture what `work` does, which happens whenever the result is called; `warm_up` does it without counting."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled or allocated at first use
            for _ in range(2):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        current = torch.cuda.current_stream()
        try:
            return _capture(work, self._pool)
        except Exception:
            torch.cuda.set_stream(current)
            _after_a_broken_capture(self._handle.device, self._pool)
            self._pool = None
            raise


def _capture(work: Callable[[], Any], pool: Any) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _after_a_broken_capture(device: torch.device, pool: Any) -> None:
    """Set torch right, which would go on taking memory from the pool, and draw no random numbers before the capture's end."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with suppress(RuntimeError):  # where torch has done so by itself
            end(device.index or 0, pool)
    number = torch.zeros(1, device=device)
    _capture(lambda: number.zero_(), None)


def usable(handle: Any) -> bool:
    """Whether graphs may serve a model at all."""
    devices = {parameter.device for parameter in handle.model.parameters()}
    # (Rotary frequencies that depend on the length are computed anew for each.)
    return devices == {handle.device} and not handle.rotaries and triton_works(handle.device)


def _fits(shard: ContextKV, device: torch.device) -> bool:
    """Whether all of a context lies as the kernel reads it."""
    shapes = set()
    for layer in shard.layers:
        if layer.expands or len(layer.segments) != 1:
            return False
        if layer.is_empty:
            continue
        k_1GLD, v_1GLD = layer.stored()[:2]
        shapes |= {(t.dtype, t.is_contiguous(), t.device) for t in (k_1GLD, v_1GLD)}
        if k_1GLD.shape != v_1GLD.shape or k_1GLD.shape[3] % 16 or k_1GLD.shape[3] > 256:
            return False
    return len(shapes) == 1 and all(
        contiguous and place == device for _, contiguous, place in shapes
    )
