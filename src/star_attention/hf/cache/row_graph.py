"""The cache of rows' decode steps inside CUDA graphs: where keys and values are is in tables.

A captured forward contains no data of rows or contexts. `RowGraphCache.load` fills the tables for
the rows whose turn it is. On several ranks each reads its shard of the contexts, and the last one
the tails; the merge is part of the graph.

Axes: R rows of the bucket, G KV heads, D head size, H query heads, L tokens of a context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import row_tables
from star_attention.attention.kernels.row_tables import RowTables
from star_attention.attention.runs import Runs
from star_attention.attention.state import State
from star_attention.distributed.comm import Comm
from star_attention.errors import UnsupportedModelError
from star_attention.hf.cache.arrivals import (
    Arrivals,
    Arriving,
    arriving,
    at_place,
    count_places,
)
from star_attention.hf.cache.base import ForwardPosition, StarCache, StarLayer, build_layers
from star_attention.hf.cache.decode import own_heads
from star_attention.hf.cache.probe import LayerKVShape, ProbeResult
from star_attention.hf.cache.readable import Shapes, can_read
from star_attention.hf.cache.rows import RowKV, RowSet
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV
from star_attention.storage.tail import Tail

_ROOM = 256
"""Tokens for which a tail gets room at least, when it has none: each time takes a millisecond."""


class RowBuffers:
    """Where the keys and values of rows and of their contexts are, as the kernel reads them.

    Args:
        probed: properties of the model's layers.
        device: where keys and values are.
        is_part: True if a shard may be a part of its context.
    """

    def __init__(self, probed: ProbeResult, device: torch.device, *, is_part: bool) -> None:
        self._is_part = is_part
        self._shapes: Shapes = probed.layer_shapes
        self._group = probed.query_group
        self._device = device
        # Addresses on the CPU; those of a row's tails with their version, by the first of them,
        # since the tokens of a query share tails.
        self._readable: WeakKeyDictionary[ContextKV, bool] = WeakKeyDictionary()
        self._shards: WeakKeyDictionary[ContextKV, list[Tensor]] = WeakKeyDictionary()
        self._tails: WeakKeyDictionary[Tail, tuple[int, Tensor | None]] = WeakKeyDictionary()

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer, at most."""
        return max(shape.k_heads for shape in self._shapes if shape is not None)

    def can_read(self, rows: RowSet) -> bool:
        """True if the kernel can read the contexts of all rows."""
        shards = [rows.rows[start].shard for start, _ in rows.groups]
        one_format = len({shard.kv_format for shard in shards}) == 1
        return one_format and all(self.reads(shard) for shard in shards)

    def reads(self, shard: ContextKV) -> bool:
        """True if the kernel can read a context."""
        if shard not in self._readable:
            self._readable[shard] = (
                (self._is_part or len(shard.segments) == 1)
                and self._group <= row_tables.MOST_HEADS
                and can_read(shard, self._shapes, self._device)
            )
        return self._readable[shard]

    def tile_rows(self, rows: RowSet) -> int:
        """Return the rows of a tile for these rows."""
        return self.tile_of(_shared(rows))

    def tile_of(self, shared: int) -> int:
        """Return the rows of a tile where so many rows share a context."""
        shape = next(shape for shape in self._shapes if shape is not None)
        return row_tables.tile_rows(
            shared,
            self._group,
            head_size=shape.k_size,
            dtype=shape.dtype,
        )

    def of_shard(self, shard: ContextKV) -> list[Tensor]:
        """Return a context's addresses, `[layers, SHARD_COLUMNS]`, at each of its places."""
        if arriving(shard.layers):
            # Its places may be others each time.
            places = range(count_places(shard.layers))
            return [_shard_addresses(shard, place) for place in places]
        if shard not in self._shards:
            self._shards[shard] = [_shard_addresses(shard)]
        return self._shards[shard]

    def _of_row(self, row: RowKV) -> Tensor:
        """Return the addresses of a row's tails, `[layers, 2]`."""
        first = row.tails[0]
        version, addresses = self._tails.get(first, (-1, None))
        if addresses is None or version != first.version:
            self._even(row)
            addresses = self._tail_addresses(row)
            self._tails[first] = first.version, addresses
        return addresses

    def _tail_addresses(self, row: RowKV) -> Tensor:
        addresses = [
            [0, 0] if shape is None else [buffer.data_ptr() for buffer in tail.buffers()]
            for tail, shape in self._stored(row)
        ]
        return torch.tensor(addresses, device="cpu")

    def _stored(self, row: RowKV) -> Iterator[tuple[Tail, LayerKVShape | None]]:
        return zip(row.tails, self._shapes, strict=True)

    def _even(self, row: RowKV) -> None:
        """Give all tails of a row the same room, which a forward without memory has not done."""
        tails = [(tail, shape) for tail, shape in self._stored(row) if shape is not None]
        most = max(tail.capacity(1) for tail, _ in tails)
        for tail, shape in tails:
            if tail.capacity(1) < most:
                k_1GCD = torch.empty(
                    1, shape.k_heads, most, shape.k_size, dtype=shape.dtype, device=self._device
                )
                tail.move_to(k_1GCD, torch.empty_like(k_1GCD))

    def reserve(self, rows: RowSet) -> None:
        """Make room for a new token in the tails of all rows."""
        # The last token of a query comes first: it needs room for all of them.
        for row in reversed(rows.rows):
            # All tails of a row grow and move together; the first stands for them.
            if row.tail_tokens + row.ahead < row.tails[0].capacity(1):
                continue
            for tail, shape in self._stored(row):
                if shape is not None:
                    number = torch.empty(1, 1, 1, 1, dtype=shape.dtype, device=self._device)
                    k_1GSD = number.expand(1, shape.k_heads, row.ahead + _ROOM, shape.k_size)
                    tail.reserve(k_1GSD, k_1GSD)
        for row in rows.rows:
            self._of_row(row)

    def advance(self, rows: RowSet) -> None:
        """Count the token of each row that a graph has appended."""
        for row in rows.rows:
            for tail, shape in self._stored(row):
                if shape is not None:
                    tail.length += 1

    def tables(self, rows: RowSet, like: RowTables, tile_rows: int) -> RowTables:
        """Make tables of these rows in host memory, of the sizes of others."""
        layers, bucket = like.tails.shape[:2]
        pinned = self._device.type == "cuda"
        tables = RowTables.zeros(layers, bucket, len(like.items), "cpu", pinned=pinned)
        shards = [rows.rows[start].shard for start, _ in rows.groups]
        read = [self.of_shard(shard)[0] for shard in shards]
        tables.shards[:, : len(shards)] = torch.stack(read, 1)
        tables.tails[:, : len(rows)] = torch.stack([self._of_row(row) for row in rows.rows], 1)
        sizes = [
            (stop - start, shard.tokens)
            for (start, stop), shard in zip(rows.groups, shards, strict=True)
        ]
        items, row_items = row_tables.work(sizes, tile_rows=tile_rows, kv_heads=self.kv_heads)
        if items:
            tables.items[: len(items)] = torch.tensor(items, dtype=torch.int32, device="cpu")
        numbers = [
            [
                row.tail_tokens + row.ahead,
                row.tails[0].capacity(1),
                row.context_tokens,
                *own_items,
            ]
            for row, own_items in zip(rows.rows, row_items, strict=True)
        ]
        tables.rows[: len(rows)] = torch.tensor(numbers, dtype=torch.int32, device="cpu")
        return tables


def _shared(rows: RowSet) -> int:
    """Return how many rows a tile is to be for: the most that share a context.

    The tokens of a query count as far as they are many for the average context. A tile that holds
    all of one query would compute nothing in most of its rows for every other context.
    """
    answers = tokens = products = 0
    for start, stop in rows.groups:
        group = rows.rows[start:stop]
        answers = max(answers, sum(not row.ahead for row in group))
        tokens += group[0].shard.tokens
        products += group[0].shard.tokens * len(group)
    return max(answers, -(-products // max(1, tokens)))


def _shard_addresses(shard: ContextKV, place: int = 0) -> Tensor:
    columns = row_tables.SHARD_COLUMNS
    addresses = torch.zeros(len(shard.layers), columns, dtype=torch.int64, device="cpu")
    for number, layer in enumerate(shard.layers):
        stored = () if layer.is_empty else at_place(layer, place)
        for column, tensor in enumerate(stored):
            addresses[number, column] = tensor.data_ptr()
        if layer.segments:
            # Where there are several, on ranks, no layer has a window, and all keys are seen.
            kept = torch.tensor([layer.tokens, layer.segments[0][0]])
            addresses[number, row_tables.SHARD_ADDRESSES :] = kept
    return addresses


class RowGraphPosition(ForwardPosition):
    """The tables from which a captured forward reads where the keys of its rows are.

    Args:
        tables: the tables, on the device.
        tile_rows: rows of a tile.
        fp8: True if contexts are in fp8.
        comm: merges the attention of all ranks.
        arrivals: the layers that arrive from host memory.
        by_heads: True if each rank computes queries, keys and values of its own heads alone.
    """

    def __init__(
        self,
        tables: RowTables,
        tile_rows: int,
        fp8: bool,
        comm: Comm,
        arrivals: Arrivals,
        *,
        by_heads: bool,
    ) -> None:
        from star_attention.attention.kernels import triton_rows

        super().__init__()
        self.kernel = triton_rows
        self.tables, self.tile_rows, self.fp8 = tables, tile_rows, fp8
        self.comm, self.arrivals, self.by_heads = comm, arrivals, by_heads

    @property
    def seen_tokens(self) -> int:
        return 1


class RowGraphLayer(StarLayer[RowGraphPosition]):
    """A layer whose keys and values are where the tables say."""

    def set_expands(self, expands: bool) -> None:
        if expands:
            raise UnsupportedModelError(
                "a layer", ["it computes keys and values from the stored ones"]
            )

    def append(self, k_RG1D: Tensor, v_RG1D: Tensor) -> tuple[Tensor, Tensor]:
        position = self.position
        if not position.by_heads:
            position.kernel.append(
                k_RG1D[:, :, 0], v_RG1D[:, :, 0], tables=position.tables, layer=self.index
            )
        # Those of the other heads come with their queries, in `attend`.
        return k_RG1D, v_RG1D

    def attend(self, q_R1HD: Tensor, k_R1GD: Tensor, v_R1GD: Tensor, rule: Rule) -> State:
        """Attend to this rank's shards, on the last rank also to the tails; merge over all ranks.

        With weights in slices, arguments and result are of this rank's heads.
        """
        position, heads, kv_heads = self.position, None, k_R1GD.shape[2]
        position.arrivals.wait_for(self.index)
        comm, tails = position.comm, position.kernel.tails_of(position.tables, self.index)
        if position.by_heads:
            heads, kv_heads = own_heads(comm, q_R1HD), kv_heads * comm.cp_size
            q_R1HD = comm.gather_new(q_R1HD, k_R1GD, v_R1GD, tails, rule.rotation)
        elif rule.rotation is not None:
            q_R1HD = tails.store(q_R1HD, k_R1GD, v_R1GD, rule.rotation)
        runs: Runs = position.kernel.attend_runs(
            q_R1HD[:, 0],
            kv_heads,
            tables=position.tables,
            layer=self.index,
            rule=rule,
            tile_rows=position.tile_rows,
            fp8=position.fp8,
            holds_tails=comm.cp_rank == comm.cp_size - 1,
        )
        if comm.cp_size == 1:
            return runs.merged()
        # Sinks are added in fp32.
        dtype = q_R1HD.dtype if rule.sink_H is None else None
        return comm.merge(runs, heads, dtype=dtype)


class RowGraphCache(StarCache):
    """The cache of one captured forward.

    Args:
        windows: sliding window of each layer in tokens, None for full attention.
        tables: tables of no rows, on the device.
        tile_rows: rows of a tile.
        fp8: True if contexts are in fp8.
        comm: the ranks whose collectives the graph contains.
        arrivals: the layers that arrive from host memory.
        slices: slices of the weights that forwards multiply, None for all of them.
    """

    layers: list[RowGraphLayer]
    position: RowGraphPosition

    def __init__(
        self,
        windows: list[int | None],
        tables: RowTables,
        tile_rows: int,
        fp8: bool,
        comm: Comm,
        arrivals: Arrivals,
        slices: Any = None,
    ) -> None:
        by_heads = slices is not None and slices.by_heads
        position = RowGraphPosition(tables, tile_rows, fp8, comm, arrivals, by_heads=by_heads)
        no_stores = [ContextKV.empty(Segments(), [False] * len(windows))]
        super().__init__(build_layers(RowGraphLayer, windows, position, no_stores), position, comm)
        self.slices = slices
        self._loaded: Any = None

    @property
    def rotates(self) -> bool:
        return True

    @property
    def positions(self) -> Tensor:
        """Positions of the new tokens, `[R, 1]`, computed on the device."""
        rows = self.position.tables.rows
        return (rows[:, :1] + rows[:, 2:3]).long()

    def advance(self) -> None:
        """Count the new token of each row, on the device."""
        rows = self.position.tables.rows
        # Unused rows stay where they are, without capacity.
        rows[:, 0] += (rows[:, 1] > 0).int()

    def load(self, rows: RowSet, buffers: RowBuffers) -> None:
        """Fill the tables for these rows, unless their forward was the last one."""
        if self._loaded != (rows.version, _tokens(rows)):
            position = self.position
            tables, arrivals = position.tables, position.arrivals
            tables.copy_(buffers.tables(rows, tables, position.tile_rows))
            if arrivals.layers:
                shards = [rows.rows[start].shard for start, _ in rows.groups]
                arrivals.load(
                    [
                        Arriving(shard.layers, tables.shards[:, number], buffers.of_shard(shard))
                        for number, shard in enumerate(shards)
                    ]
                )
        # Until `ran`, the tables may count a token that the rows do not have.
        self._loaded = None

    def ran(self, rows: RowSet) -> None:
        """Note that the forward has run on these rows: the tables count its new tokens."""
        self._loaded = rows.version, _tokens(rows)


def _tokens(rows: RowSet) -> int:
    return sum(row.tail_tokens for row in rows.rows)
