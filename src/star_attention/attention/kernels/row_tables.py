"""Tables on the device from which the kernel of rows (`triton_rows`) reads what is where.

Contexts are cut into work items: a run of one context's keys, for a tile of neighboring rows that
share it. The host makes the list of items when rows come or go, balanced over the lengths of the
contexts; their number is a constant of the bucket, and some may be empty.

Axes: R rows of the bucket, G KV heads, D head size, P items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 256
"""Programs over contexts, about: two for each multiprocessor of a large GPU."""
SHORTEST_RUN = 256
"""Keys of a run at least, where there are as many: each run is a partial result to merge."""
TILES = (16, 64, 128)
"""Query rows of a tile: those of one KV head, of neighboring rows that share a context."""
MOST_HEADS = TILES[-1]
"""Query heads of a KV head, at most, since those of a row are in one tile."""

SHARD_ADDRESSES = 4
"""Addresses of a shard: keys, values, `[G, tokens, D]`, and in fp8 their scales, `[G, tokens]`."""
SHARD_COLUMNS = SHARD_ADDRESSES + 2
"""After the addresses come the tokens that the layer keeps of the shard, and the first of them."""
ITEM_COLUMNS = 5
"""Numbers of an item: its shard, the number of the run and how many runs the tokens are cut into,
the first row, and rows; no rows for an item that is empty."""
ROW_COLUMNS = 6
"""Numbers of a row: tokens of its tail before the new one, the tail's capacity, tokens of its
context, its first item, how many items, and its place in their tiles. An unused row has none of
these: its tail has no capacity."""


@dataclass(frozen=True, kw_only=True)
class RowTables:
    """Tensors from which the kernels read what is where, on their device.

    Attributes:
        addresses: int64; the memory of `shards` and `tails`.
        numbers: int32; the memory of `items` and `rows`.
        shards: `[layers, R, SHARD_COLUMNS]`, a context for each row, if there are as many.
        tails: addresses of each row's keys and values, `[G, capacity, D]`: `[layers, R, 2]`.
        items: `[P, ITEM_COLUMNS]`.
        rows: `[R, ROW_COLUMNS]`.
    """

    addresses: Tensor
    numbers: Tensor
    shards: Tensor
    tails: Tensor
    items: Tensor
    rows: Tensor

    @classmethod
    def zeros(
        cls, layers: int, rows: int, items: int, device: torch.device | str, *, pinned: bool = False
    ) -> RowTables:
        """Make tables of no rows, for up to `rows` of them and `items` items.

        Args:
            layers: layers of the cache.
            rows: rows of the bucket.
            items: items of the bucket, `most_items`.
            device: where the tables are.
            pinned: place them in host memory from which a GPU copies without waiting.
        """
        options: Any = dict(device=device, pin_memory=pinned)
        shards, tails = layers * rows * SHARD_COLUMNS, layers * rows * 2
        addresses = torch.zeros(shards + tails, dtype=torch.int64, **options)
        sizes = [items * ITEM_COLUMNS, rows * ROW_COLUMNS]
        numbers = torch.zeros(sum(sizes), dtype=torch.int32, **options)
        items_P, rows_R = numbers.split(sizes)
        return cls(
            addresses=addresses,
            numbers=numbers,
            shards=addresses[:shards].view(layers, rows, SHARD_COLUMNS),
            tails=addresses[shards:].view(layers, rows, 2),
            items=items_P.view(items, ITEM_COLUMNS),
            rows=rows_R.view(rows, ROW_COLUMNS),
        )

    def copy_(self, other: RowTables) -> None:
        """Take over the contents of other tables of these sizes, without waiting for a device."""
        self.addresses.copy_(other.addresses, non_blocking=True)
        self.numbers.copy_(other.numbers, non_blocking=True)


def most_items(rows: int, kv_heads: int) -> int:
    """Return the number of items of a bucket: enough for any contexts of its rows."""
    return rows + runs_wanted(kv_heads)


def runs_wanted(kv_heads: int) -> int:
    return max(1, PROGRAMS // kv_heads)


def tile_rows(shared: int, group: int, *, head_size: int, dtype: torch.dtype) -> int:
    """Return the rows of a tile, one of few numbers, since each takes a CUDA graph of its own.

    Args:
        shared: the most rows that share a context.
        group: query heads of a KV head; `MOST_HEADS` at most.
        head_size: of keys and values.
        dtype: of the queries. Tiles of large elements are smaller, since registers hold them.
    """
    assert group <= MOST_HEADS
    largest = 16
    if dtype.itemsize == 2:
        largest = 128 if head_size <= 128 else 64
    size = next((size for size in TILES if size >= shared * group), largest)
    return max(1, min(size, largest) // group)


def tile_size(rows: int, group: int) -> int:
    """Return the query rows of a tile for Triton, which takes powers of two."""
    return max(16, 1 << (rows * group - 1).bit_length())


def work(
    shards: Sequence[tuple[int, int]], *, tile_rows: int, kv_heads: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Cut contexts into items of about the same size.

    Args:
        shards: rows and tokens of each context, in the order of the rows.
        tile_rows: rows of a tile, at most.
        kv_heads: heads of keys and values, which have programs of their own.

    Returns:
        The items, `ITEM_COLUMNS` numbers each; at most `most_items`. And of each row its first
        item, how many items, and its place in their tiles.
    """
    tiles, first_row = [], 0
    for number, (rows, tokens) in enumerate(shards):
        for row in range(0, rows, tile_rows):
            tiles.append((number, tokens, first_row + row, min(tile_rows, rows - row)))
        first_row += rows
    total = sum(tokens for _, tokens, _, _ in tiles)
    run = max(SHORTEST_RUN, -(-total // runs_wanted(kv_heads)))
    items: list[list[int]] = []
    row_items: list[list[int]] = []
    for number, tokens, row, rows in tiles:
        runs = -(-tokens // run)
        row_items += [[len(items), runs, place] for place in range(rows)]
        items += [[number, index, runs, row, rows] for index in range(runs)]
    return items, row_items
