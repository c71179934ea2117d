"""States over runs of keys, of which each query has several that are still to be merged.

A kernel on the device cuts keys into runs; on ranks, one launch merges the runs of all of them
(`distributed.peers`).

Axes: B batch, Q query rows, H query heads, D head size, P places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from star_attention.attention.state import State


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """Where the runs of a row are whose number differs from row to row (`triton_rows`).

    Attributes:
        rows: `RowTables.rows`.
        tails_at: the place of the first run over a tail.
        kv_heads: heads of keys and values.
        tile_size: query rows of a tile, whose runs lie next to each other.
    """

    rows: Tensor
    tails_at: int
    kv_heads: int
    tile_size: int


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The states over runs of keys.

    Attributes:
        shape: of the merged result, `(B, Q, H, D)`.
        out_PD: weighted means of the values, fp32.
        lse_P: logarithms to base 2 of the sums of exponentials of the scores, fp32; of a run
            without keys, which has zeros, it is -inf.
        count: runs of each query and head, which lie one after the other, or, with a table, of
            each row's tail.
        table: where runs are whose number differs from row to row.
        merged: launches the kernel that merges them.
    """

    shape: tuple[int, int, int, int]
    out_PD: Tensor
    lse_P: Tensor
    count: int
    table: RunTable | None = None
    merged: Callable[[], State]


def shape_of(part: State | Runs) -> tuple[int, int, int, int]:
    """Return the shape of a state, or of what runs are merged into."""
    if isinstance(part, Runs):
        return part.shape
    B, Q, H, D = part.out_BQHD.shape
    return B, Q, H, D
