"""Attention of one new token of many rows, whose contexts differ, in Triton.

A row is one answer under way: it reads a context, which it may share with other rows, and a tail of
its own. Everything that depends on rows and contexts is in `RowTables` on the device, so that a
CUDA graph serves any rows of its bucket.

Contexts are cut into work items (`row_tables`), each of which reads its keys once for all query
heads of all its rows, and tails into `TAIL_RUNS` each. A last kernel merges the runs of each row.

Axes: R rows of the bucket, H query heads, G KV heads, D head size, P items, M query rows of a tile,
N keys of one step, S runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import triton_pdl
from star_attention.attention.kernels.row_tables import (
    ITEM_COLUMNS,
    ROW_COLUMNS,
    SHARD_COLUMNS,
    RowTables,
    runs_wanted,
    tile_size,
)
from star_attention.attention.kernels.triton_new import Tails
from star_attention.attention.kernels.triton_run import launch_options, run
from star_attention.attention.runs import Runs, RunTable
from star_attention.attention.state import State

TAIL_RUNS = 4
"""Runs over each row's tail, at most."""
_MANY_TAILS = 128
"""Tails (rows times KV heads) from which on two runs of each fill a large GPU; of twice as many one
does."""
_MERGED = (16, 64)
"""Runs that a program of the merge reads at once, at least and at most."""
_MERGED_NUMBERS = 8192
"""Numbers of these runs, at most: with 64 runs of heads of 256, registers do not hold them."""

_PER_SHARD: tl.constexpr = tl.constexpr(SHARD_COLUMNS)
_PER_ITEM: tl.constexpr = tl.constexpr(ITEM_COLUMNS)
_PER_ROW: tl.constexpr = tl.constexpr(ROW_COLUMNS)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _of_context(
    q_ptr, shards_ptr, items_ptr, rows_ptr, out_ptr, lse_ptr, layer_rows, item, g,
    scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attend to one item's run of a context's keys; the result is that of its tile."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    STORED: tl.constexpr = tl.float8e4nv if FP8 else DTYPE
    item_ptr = items_ptr + item * _PER_ITEM
    shard_ptr = shards_ptr + (layer_rows + tl.load(item_ptr)) * _PER_SHARD
    tokens = tl.load(shard_ptr + 4).to(tl.int32)
    rows = tl.load(item_ptr + 4)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row_mask = m < rows * GROUP
    row = tl.load(item_ptr + 3) + m // GROUP
    at_M = (row * HEADS + g * GROUP + m % GROUP).to(tl.int64)
    mask_MD = row_mask[:, None] & (d < D)[None, :]
    q_MD = tl.load(q_ptr + at_M[:, None] * D + d[None, :], mask=mask_MD, other=0.0)

    # Each row sees the keys from `first` on.
    first_M = m * 0
    start = 0
    if WINDOW:
        row_ptr = rows_ptr + row * _PER_ROW
        position = tl.load(row_ptr, mask=row_mask, other=0)
        position += tl.load(row_ptr + 2, mask=row_mask, other=0)
        position -= tl.load(shard_ptr + 5).to(tl.int32)
        first_M = tl.maximum(position - window + 1, 0)
        start = tl.min(tl.where(row_mask, first_M, tokens)) // BLOCK_N * BLOCK_N
    pieces = tl.load(item_ptr + 2)
    length = tl.cdiv(tl.cdiv(tl.maximum(tokens - start, 0), pieces), BLOCK_N) * BLOCK_N
    start += tl.load(item_ptr + 1) * length
    stop = tl.minimum(start + length, tokens)

    # Addresses read on the device do not imply an alignment, and unaligned loads are slow.
    base = tl.multiple_of(g.to(tl.int64) * tokens * D, 16)
    k_ptr = tl.load(shard_ptr).to(tl.pointer_type(STORED)) + base
    v_ptr = tl.load(shard_ptr + 1).to(tl.pointer_type(STORED)) + base
    k_scale_ptr = tl.load(shard_ptr + 2).to(tl.pointer_type(tl.float32)) + g * tokens
    v_scale_ptr = tl.load(shard_ptr + 3).to(tl.pointer_type(tl.float32)) + g * tokens
    out_MD, lse_M = run(
        q_MD, tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16), k_scale_ptr, v_scale_ptr,
        first_M, first_M, start, stop, scale, softcap,
        D, BLOCK_M, BLOCK_N, BLOCK_D, SOFTCAP, WINDOW, False, PRECISION, FP8,
    )  # fmt: skip
    place_M = (item * KV_HEADS + g) * BLOCK_M + m
    tl.store(out_ptr + place_M.to(tl.int64)[:, None] * D + d[None, :], out_MD, mask=mask_MD)
    tl.store(lse_ptr + place_M, lse_M, mask=row_mask)


@triton.jit
def _of_tail(
    q_ptr, tails_ptr, rows_ptr, out_ptr, lse_ptr, tails_at, layer_rows, row, number, g,
    scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    TAIL_RUNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to one run of a row's tail, which holds the new key already."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    row_ptr = rows_ptr + row * _PER_ROW
    before = tl.load(row_ptr)
    capacity = tl.load(row_ptr + 1)
    tokens = tl.minimum(before + 1, capacity)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row_mask = m < GROUP
    mask_MD = row_mask[:, None] & (d < D)[None, :]
    at_M = (row * HEADS + g * GROUP + m).to(tl.int64)
    q_MD = tl.load(q_ptr + at_M[:, None] * D + d[None, :], mask=mask_MD, other=0.0)
    first = 0
    if WINDOW:
        first = tl.maximum(before - window + 1, 0)
    start = first // BLOCK_N * BLOCK_N
    length = tl.cdiv(tl.cdiv(tl.maximum(tokens - start, 0), TAIL_RUNS), BLOCK_N) * BLOCK_N
    start += number * length
    stop = tl.minimum(start + length, tokens)
    tail_ptr = tails_ptr + (layer_rows + row) * 2
    base = tl.multiple_of(g.to(tl.int64) * capacity * D, 16)
    k_ptr = tl.load(tail_ptr).to(tl.pointer_type(DTYPE)) + base
    v_ptr = tl.load(tail_ptr + 1).to(tl.pointer_type(DTYPE)) + base
    out_MD, lse_M = run(
        q_MD, tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16), k_ptr, v_ptr,
        m * 0 + first, m, start, stop, scale, softcap,
        D, BLOCK_M, BLOCK_N, BLOCK_D, SOFTCAP, WINDOW, False, PRECISION, False,
    )  # fmt: skip
    place_M = (tails_at + (row * TAIL_RUNS + number) * HEADS + g * GROUP + m).to(tl.int64)
    tl.store(out_ptr + place_M[:, None] * D + d[None, :], out_MD, mask=mask_MD)
    tl.store(lse_ptr + place_M, lse_M, mask=row_mask)


@triton.jit
def _row_runs(
    q_ptr, shards_ptr, tails_ptr, items_ptr, rows_ptr, out_ptr, lse_ptr,
    tails_at, layer_rows, items, scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TAIL_RUNS: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    triton_pdl.begin(PDL)
    g = tl.program_id(0)
    part = tl.program_id(1)
    # Contexts come first: their runs take longer. Without runs over tails there is nothing else.
    if TAIL_RUNS == 0 or part < items:
        if tl.load(items_ptr + part * _PER_ITEM + 4) > 0:
            _of_context(
                q_ptr, shards_ptr, items_ptr, rows_ptr, out_ptr, lse_ptr, layer_rows, part, g,
                scale, softcap, window,
                HEADS, KV_HEADS, D, BLOCK_M, BLOCK_N, BLOCK_D, SOFTCAP, WINDOW, PRECISION, FP8,
            )  # fmt: skip
    else:
        _of_tail(
            q_ptr, tails_ptr, rows_ptr, out_ptr, lse_ptr, tails_at, layer_rows,
            (part - items) // TAIL_RUNS, (part - items) % TAIL_RUNS, g, scale, softcap, window,
            HEADS, KV_HEADS, D, TAIL_RUNS, TAIL_M, BLOCK_N, BLOCK_D, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip


@triton.jit
def _merged_rows(
    out_ptr, lse_ptr, rows_ptr, result_ptr, result_lse_ptr, tails_at,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TAIL_RUNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the runs over a row's context, and from place `tails_at` those over its tail."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    h = tl.program_id(0)
    row = tl.program_id(1)
    # The kernel of the runs does not write these.
    row_ptr = rows_ptr + row * _PER_ROW
    first = tl.load(row_ptr + 3)
    items = tl.load(row_ptr + 4)
    place = tl.load(row_ptr + 5) * GROUP + h % GROUP
    triton_pdl.begin(PDL)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    out_D = tl.full((BLOCK_D,), 0.0, tl.float32)
    for chunk in tl.range(0, items + TAIL_RUNS, BLOCK_S):
        s = chunk + tl.arange(0, BLOCK_S)
        of_item = ((first + s) * KV_HEADS + h // GROUP) * BLOCK_M + place
        of_tail = tails_at + (row * TAIL_RUNS + s - items) * HEADS + h
        place_S = tl.where(s < items, of_item, of_tail).to(tl.int64)
        lse_S = tl.load(lse_ptr + place_S, mask=s < items + TAIL_RUNS, other=float("-inf"))
        # Of runs without keys nothing is read.
        mask_SD = (lse_S > float("-inf"))[:, None] & d_mask[None, :]
        out_SD = tl.load(out_ptr + place_S[:, None] * D + d[None, :], mask=mask_SD, other=0.0)
        new = tl.maximum(top, tl.max(lse_S))
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - safe)
        weight_S = tl.exp2(lse_S - safe)
        out_D = out_D * shrink + tl.sum(out_SD * weight_S[:, None], 0)
        total = total * shrink + tl.sum(weight_S)
        top = new
    has_keys = total > 0.0
    total = tl.where(has_keys, total, 1.0)
    at = row * HEADS + h
    tl.store(result_ptr + at * D + d, out_D / total, mask=d_mask)
    lse = tl.where(has_keys, (top + tl.log2(total)) / _LOG2_E, float("-inf"))
    tl.store(result_lse_ptr + at, lse)


def append(k_RGD: Tensor, v_RGD: Tensor, *, tables: RowTables, layer: int) -> None:
    """Write each row's new key and value after its tail, which has room for them.

    Args:
        k_RGD: keys.
        v_RGD: values.
        tables: where the tails are.
        layer: row of the addresses.
    """
    tails_of(tables, layer).store(None, k_RGD[:, None], v_RGD[:, None], None)


def tails_of(tables: RowTables, layer: int) -> Tails:
    """Return where a layer's new keys and values go."""
    first = layer * tables.tails.shape[1] * 2
    return Tails(addresses=tables.tails, numbers=tables.rows, first=first, by_row=True)


def attend_runs(
    q_RHD: Tensor,
    kv_heads: int,
    *,
    tables: RowTables,
    layer: int,
    rule: Rule,
    tile_rows: int,
    fp8: bool = False,
    holds_tails: bool = True,
    **options: Any,
) -> Runs:
    """Compute attention of each row's new token over its context and its tail.

    Call `append` first: a row sees itself in its tail. A row that sees no key, as unused ones, gets
    zeros and an lse of -inf. Of a rank's shard of contexts, windows are not known.

    Args:
        q_RHD: queries.
        kv_heads: heads of keys and values.
        tables: where contexts and tails are.
        layer: row of the addresses.
        rule: scale, window, softcap, and the precision of the result.
        tile_rows: rows of a tile, for which the items were made.
        fp8: True if contexts are in e4m3 with scales, False if they are in the queries' precision,
            as tails always are.
        holds_tails: True if this rank attends to the tails.
        options: instead of `launch_options`.

    Returns:
        The runs of the state, `[R, 1, H, D]`.
    """
    R, H, D = q_RHD.shape
    q_RHD, device, items = q_RHD.contiguous(), q_RHD.device, len(tables.items)
    block_m, block_d = tile_size(tile_rows, H // kv_heads), max(16, triton.next_power_of_2(D))
    # Results of the runs over contexts, then of those over tails.
    tails_at = items * kv_heads * block_m
    # Each run is a partial result to merge.
    tails = R * kv_heads
    most = TAIL_RUNS if tails < _MANY_TAILS else 2 if tails < 2 * _MANY_TAILS else 1
    tail_runs = min(most, TAIL_RUNS) if holds_tails else 0
    runs = tails_at + R * tail_runs * H
    out = torch.empty(runs, D, dtype=torch.float32, device=device)
    lse = torch.empty(runs, dtype=torch.float32, device=device)
    shape = dict(HEADS=H, KV_HEADS=kv_heads, D=D, TAIL_RUNS=tail_runs, BLOCK_D=block_d)
    early = triton_pdl.options(device)
    _row_runs[(kv_heads, items + R * tail_runs)](
        q_RHD, tables.shards, tables.tails, tables.items, tables.rows, out, lse,
        tails_at, layer * tables.tails.shape[1], items,
        rule.scale, rule.softcap or 0.0, rule.window or 0,
        BLOCK_M=block_m, TAIL_M=tile_size(1, H // kv_heads),
        SOFTCAP=rule.softcap is not None, WINDOW=rule.window is not None,
        PRECISION="ieee" if q_RHD.dtype == torch.float32 else "tf32", FP8=fp8,
        **shape, **early, **(launch_options(block_m, D, q_RHD.dtype, fp8=fp8) | options),
    )  # fmt: skip
    # Rows that fill their tiles have so many runs over their contexts.
    seen = triton.next_power_of_2(runs_wanted(kv_heads) * tile_rows // R + tail_runs)
    chunk = min(max(seen, _MERGED[0]), _MERGED[1], _MERGED_NUMBERS // block_d)
    dtype = rule.dtype or torch.float32
    table = RunTable(rows=tables.rows, tails_at=tails_at, kv_heads=kv_heads, tile_size=block_m)
    return Runs(
        shape=(R, 1, H, D),
        out_PD=out,
        lse_P=lse,
        count=tail_runs,
        table=table,
        merged=lambda: _merged(out, lse, table, (R, H), tail_runs, chunk, dtype),
    )


def _merged(
    out_PD: Tensor,
    lse_P: Tensor,
    table: RunTable,
    rows: tuple[int, int],
    tail_runs: int,
    chunk: int,
    dtype: torch.dtype,
) -> State:
    (R, H), D, device = rows, out_PD.shape[1], out_PD.device
    out_R1HD = torch.empty(R, 1, H, D, dtype=dtype, device=device)
    lse_R1H = torch.empty(R, 1, H, dtype=torch.float32, device=device)
    _merged_rows[(H, R)](
        out_PD, lse_P, table.rows, out_R1HD, lse_R1H, table.tails_at,
        HEADS=H, KV_HEADS=table.kv_heads, D=D, TAIL_RUNS=tail_runs, BLOCK_M=table.tile_size,
        BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_S=chunk, num_warps=2,
        **triton_pdl.options(device),
    )  # fmt: skip
    return State(out_R1HD, lse_R1H)
