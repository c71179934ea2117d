"""The cache of phase 2 inside CUDA graphs: its layers read where keys and values are from tables.

A captured forward contains no data of a context. `GraphCache.load` fills the tables for the
`AnswerCache` whose turn it is.

Axes: R rows, Q new tokens of each row, G KV heads, D head size, H query heads, K keys, L tokens of
the shard.
"""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.runs import Runs
from star_attention.attention.state import State
from star_attention.distributed.comm import Comm
from star_attention.errors import UnsupportedModelError
from star_attention.hf.cache.arrivals import Arrivals, Arriving, at_place, count_places
from star_attention.hf.cache.base import ForwardPosition, StarCache, StarLayer, build_layers
from star_attention.hf.cache.decode import AnswerCache, own_heads
from star_attention.hf.cache.latent import LatentAttention, Latents
from star_attention.hf.cache.readable import Shapes
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV
from star_attention.storage.oom import allocate
from star_attention.storage.transfers import overwrite


class TailBuffers:
    """The tails of a cache as the kernels of a graph see them: addresses, room and length.

    A graph appends tokens on the device; `advance` counts them on the host.

    Args:
        cache: the cache of an answer.
        shapes: shapes of its layers' entries; a rank may hold no part of the context.
        device: where keys and values are.
    """

    def __init__(self, cache: AnswerCache, shapes: Shapes, device: torch.device) -> None:
        self._layers = list(zip(cache.layers, shapes, strict=True))
        self._device = device
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
        """Make room for new tokens in all tails: buffers of one shape are parts of one tensor.

        The first token of an answer would wait for an allocation for each of them.
        """
        stored = [(layer.tail, shape) for layer, shape in self._layers if shape is not None]
        room = max(tail.room_for(tokens) for tail, _ in stored)
        kinds = [
            ((shape.k_heads, shape.k_size, shape.dtype), (shape.v_heads, shape.v_size, shape.dtype))
            for _, shape in stored
        ]
        free = {
            kind: list(self._allocate(count, rows, room, *kind).unbind())
            for kind, count in Counter(chain.from_iterable(kinds)).items()
        }
        for (tail, _), (k_kind, v_kind) in zip(stored, kinds, strict=True):
            tail.move_to(free[k_kind].pop(), free[v_kind].pop())

    def _allocate(
        self, count: int, rows: int, room: int, heads: int, size: int, dtype: torch.dtype
    ) -> Tensor:
        shape = count, rows, heads, room, size
        return allocate(lambda: torch.empty(shape, dtype=dtype, device=self._device))

    def advance(self, tokens: int) -> None:
        """Count tokens that a graph has appended."""
        for layer, shape in self._layers:
            if shape is not None:
                layer.tail.length += tokens

    def addressed(self, place: int = 0) -> list[tuple[Tensor | None, ...]]:
        """Return the tensors whose addresses the kernels read, in the order of the table's columns.

        Each layer's shard and tail, keys and values each, and scales in fp8; nothing for a layer
        that reads another layer's keys.

        Args:
            place: which of a layer's places, for those that arrive from host memory.
        """
        layers: list[tuple[Tensor | None, ...]] = []
        for layer, shape in self._layers:
            if shape is None:
                layers.append(())
            elif layer.shard.is_empty:
                layers.append((None, None, *layer.tail.buffers()))
            else:
                k, v, *scales = at_place(layer.shard, place)
                layers.append((k, v, *layer.tail.buffers(), *scales))
        return layers


class GraphPosition(ForwardPosition):
    """The tables on the device from which captured kernels read where the keys are.

    Args:
        windows: sliding window of each layer in tokens, None for full attention. Layers with the
            same one are of a kind: they keep the same tokens of a context.
        rows: most rows of a forward.
        device: where the tables are.
        comm: merges the attention of all ranks.
        arrivals: the layers that arrive from host memory.
    """

    def __init__(
        self,
        windows: list[int | None],
        rows: int,
        device: torch.device,
        comm: Comm,
        arrivals: Arrivals,
    ) -> None:
        from star_attention.attention.kernels import triton_absorb, triton_answer, triton_latent

        super().__init__()
        self.kernel, self.latent_kernel = triton_answer, triton_latent
        self.token_kernel = triton_absorb
        self.kinds = list(dict.fromkeys(windows))
        self.tables = triton_answer.KVTables.zeros(len(windows), rows, device, len(self.kinds))
        self.comm = comm
        # Of the forward that is being captured: how the context is stored, and whether each rank
        # computes queries, keys and values of its own heads alone.
        self.fp8 = self.by_heads = False
        # And of each layer the attention that need not expand what it stores.
        self.latents: Latents | None = None
        self.arrivals = arrivals
        # The layers at which another graph begins.
        self.parts: frozenset[int] = frozenset()

    @property
    def seen_tokens(self) -> int:
        return 1


class GraphLayer(StarLayer[GraphPosition]):
    """A layer whose keys and values are where the tables say."""

    @property
    def _latent(self) -> LatentAttention | None:
        latents = self.position.latents
        return None if latents is None else latents[self.index]

    def set_expands(self, expands: bool) -> None:
        if expands and self._latent is None:
            raise UnsupportedModelError(
                "a layer", ["it computes keys and values from the stored ones"]
            )

    _new: tuple[Tensor, Tensor] | None = None
    """What a single token stores, which the kernel that absorbs its query does."""
    _norm: tuple[Tensor, float] | None = None
    """The norm that it computes before."""

    def expect_latent(
        self, c_111C: Tensor, r_111P: Tensor, norm: tuple[Tensor, float] | None
    ) -> None:
        """Know a single token's compressed key, which `attend` finishes and stores.

        Args:
            c_111C: what is compressed, before its norm if there is one.
            r_111P: the rotary part, before its rotation if the attention's rule has one.
            norm: weight and epsilon of the norm.
        """
        self._new, self._norm = (c_111C, r_111P), norm
        self.expect(c_111C, r_111P)

    def append(self, k_RGQD: Tensor, v_RGQD: Tensor) -> tuple[Tensor, Tensor]:
        # Nothing is left of a forward that failed.
        self._new = self._norm = None
        if self._latent is not None and k_RGQD.shape[0] == k_RGQD.shape[2] == 1:
            self._new = k_RGQD, v_RGQD
            return k_RGQD[:], v_RGQD[:]
        if not self.position.by_heads:
            self._store(k_RGQD, v_RGQD)
        if self._latent is not None:
            # The model expands what is returned, of which nothing is used.
            return k_RGQD[:, :, :1], v_RGQD[:, :, :1]
        # Those of the other heads come with their queries, in `attend`.
        return k_RGQD, v_RGQD

    def _store(self, k_RGQD: Tensor, v_RGQD: Tensor) -> None:
        position = self.position
        kernel = position.kernel if self._latent is None else position.latent_kernel
        kernel.append(k_RGQD, v_RGQD, tables=position.tables, layer=self.index)

    def attend(self, q_RQHD: Tensor, k_RKGD: Tensor, v_RKGD: Tensor, rule: Rule) -> State:
        """Attend to this rank's shard, on the last rank also to the tail; merge over all ranks.

        With weights in slices, arguments and result are of this rank's heads.
        """
        self.position.arrivals.wait_for(self.index)
        if self.index in self.position.parts:
            self.position.arrivals.part()
        if self._latent is not None:
            return self._attend_compressed(self._latent, q_RQHD, rule)
        position, heads, kv_heads = self.position, None, k_RKGD.shape[2]
        comm, tails = position.comm, position.kernel.tails_of(position.tables, self.index)
        if position.by_heads:
            heads, kv_heads = own_heads(comm, q_RQHD), kv_heads * comm.cp_size
            q_RQHD = comm.gather_new(q_RQHD, k_RKGD, v_RKGD, tails, rule.rotation)
        elif rule.rotation is not None:
            q_RQHD = tails.store(q_RQHD, k_RKGD, v_RKGD, rule.rotation)
        runs: Runs = position.kernel.attend_runs(
            q_RQHD,
            kv_heads,
            tables=position.tables,
            layer=self.index,
            rule=rule,
            kind=position.kinds.index(self.window),
            fp8=position.fp8,
        )
        if comm.cp_size == 1:
            return runs.merged()
        # Sinks are added in fp32.
        dtype = q_RQHD.dtype if rule.sink_H is None else None
        return comm.merge(runs, heads, dtype=dtype)

    def _attend_compressed(self, latent: LatentAttention, q_RQHD: Tensor, rule: Rule) -> State:
        """Do as `attend` does, to compressed keys and values."""
        position, expansion = self.position, latent.expansion()
        assert not position.by_heads, "MLA's heads share what is stored"
        where: dict[str, Any] = dict(tables=position.tables, layer=self.index, rule=rule)
        new, self._new = self._new, None
        if new is not None:
            where |= dict(fp8=position.fp8, norm=self._norm)
            state = position.token_kernel.attend(q_RQHD, new, expansion, **where)
        else:
            compressed = position.latent_kernel.attend(
                expansion.absorb(q_RQHD), latent.compressed_size, fp8=position.fp8, **where
            )
            state = expansion.expand(compressed, rule.dtype)
        # Expanded before ranks merge: values are smaller than what they are made of.
        return state if position.comm.cp_size == 1 else position.comm.merge(state)


class GraphCache(StarCache):
    """The cache of captured forwards.

    Args:
        windows: sliding window of each layer in tokens, None for full attention.
        rows: most rows of a forward.
        device: the GPU.
        comm: the ranks whose collectives the graphs contain.
        arrivals: the layers that arrive from host memory.
    """

    layers: list[GraphLayer]
    position: GraphPosition

    def __init__(
        self,
        windows: list[int | None],
        rows: int,
        device: torch.device,
        comm: Comm,
        arrivals: Arrivals,
    ) -> None:
        position = GraphPosition(windows, rows, device, comm, arrivals)
        no_stores = [ContextKV.empty(Segments(), [False] * len(windows))]
        super().__init__(build_layers(GraphLayer, windows, position, no_stores), position, comm)
        self._loaded: tuple[Any, ...] = ()

    @property
    def attends_compressed(self) -> bool:
        latents = self.position.latents
        return latents is not None and None not in latents

    @property
    def rotates(self) -> bool:
        return self.position.latents is None

    @property
    def finishes_latents(self) -> bool:
        return self.attends_compressed

    def prepare_capture(self, cache: AnswerCache, queries: int) -> None:
        """Prepare to capture a forward like those of `cache`, of `queries` new tokens a row."""
        self.position.parts = parts(len(self.layers)) if queries > 1 else frozenset()
        self.slices = cache.slices
        self.position.fp8 = cache.kv_format.dtype == "fp8"
        self.position.by_heads = cache.position.by_heads
        self.position.latents = cache.position.latents

    def load(self, cache: AnswerCache, tails: TailBuffers, rows: int) -> None:
        """Point the tables at a cache, unless its forward was the last one."""
        signature = _signature(cache, tails, rows)
        if signature == self._loaded:
            return
        comm, kernel, tables = self.comm, self.position.kernel, self.position.tables
        shards, arrivals = [layer.shard for layer in cache.layers], self.position.arrivals
        places = range(count_places(shards))
        addresses = [kernel.addresses(tails.addressed(place)) for place in places]
        overwrite(tables.addresses, addresses[0])
        if arrivals.layers:
            arrivals.load([Arriving(shards, tables.addresses, addresses)])
        by_kind = [
            kernel.lengths(
                cache.kept_with(window),
                context_tokens=cache.context_tokens,
                tail_tokens=tails.tokens,
                capacity=tails.capacity(rows),
                holds_tail=comm.cp_rank == comm.cp_size - 1,
            )
            for window in self.position.kinds
        ]
        overwrite(tables.lengths, torch.stack(by_kind))
        padding = torch.tensor(cache.row_padding(rows), dtype=torch.int32, device="cpu")
        overwrite(tables.padding_R[:rows], padding)
        self._loaded = signature

    def ran(self, cache: AnswerCache, tails: TailBuffers, rows: int) -> None:
        """Note that a graph has run on a cache: the tables count its new tokens."""
        self._loaded = _signature(cache, tails, rows)

    def forget(self) -> None:
        """Load the tables again before the next forward."""
        self._loaded = ()


def _signature(cache: AnswerCache, tails: TailBuffers, rows: int) -> tuple[Any, ...]:
    return weakref.ref(cache), tails.version, tails.tokens, rows


def parts(layers: int) -> frozenset[int]:
    """Return the layers at which another graph begins, in a forward that the device waits for.

    The device begins with a graph once all of it is launched: 4 ms before the first kernel were
    seen on two H200s, for a query of 64 tokens through 32 layers in 1,552 kernels. Each graph has
    twice the layers of the one before, so that it is launched while that one runs. A decode step is
    launched while the one before it runs.
    """
    return frozenset(layer for layer in range(1, layers - 1) if layer & (layer + 1) == 0)
