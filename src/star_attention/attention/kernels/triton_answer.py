"""Phase 2's attention in Triton, with addresses and lengths of the keys read on the device.

torch's kernels take both from the host, so a CUDA graph of them serves one context at one step.
Here `KVTables` hold the addresses of each layer's keys and values and their numbers of tokens: one
graph serves every context and every step.

Keys are cut into runs (flash decoding, Dao et al. 2023): `splits` over the context, which all rows
share and whose keys are read once for all of them, and `TAIL_SPLITS` over each row's tail. A second
kernel merges the runs.

A rank holds a shard of the context: up to `MAX_SEGMENTS` runs of its tokens, or none. All ranks
append to the tail, one of them attends to it; the states of all ranks are merged elsewhere.

Axes: R batch rows, Q new tokens of each, H query heads, G KV heads, M query rows of one KV head,
D head size, N keys of one step, S runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import triton_pdl
from star_attention.attention.kernels.row_tables import tile_size
from star_attention.attention.kernels.triton_new import Tails
from star_attention.attention.kernels.triton_run import launch_options, merged, run
from star_attention.attention.runs import Runs
from star_attention.attention.state import State

TAIL_SPLITS = 4
"""Runs over each row's tail."""
SPLITS = 32
"""Runs over the context."""
_MERGED_D = 32
"""Elements of a head that a program of the merge holds: one token has few heads."""

COLUMNS = 6
"""Addresses of a layer: the context's keys and values, `[G, tokens, D]`, the tail's,
`[R, G, capacity, D]`, and the fp32 scales of keys and values of a context in fp8, `[G, tokens]`."""
MAX_SEGMENTS = 128
"""Segments of a shard, at most: ring attention's zig-zag layout has two, look-back has stripes."""
LENGTHS = 6 + 2 * MAX_SEGMENTS
"""Numbers of a forward, see `lengths`."""
_SEGMENTS: tl.constexpr = tl.constexpr(6)


@dataclass(frozen=True, kw_only=True)
class KVTables:
    """Tensors on the device from which the kernels read where keys and values are.

    Attributes:
        addresses: int64 `[layers, COLUMNS]`.
        lengths: int64 `[kinds, LENGTHS]`, see `lengths`; a kind of layers keeps the same tokens.
        padding_R: tokens of padding at the beginning of each row's tail, int32.
    """

    addresses: Tensor
    lengths: Tensor
    padding_R: Tensor

    @classmethod
    def zeros(cls, layers: int, rows: int, device: torch.device, kinds: int = 1) -> KVTables:
        """Make tables to be filled later, for up to `rows` batch rows."""
        return cls(
            addresses=torch.zeros(layers, COLUMNS, dtype=torch.int64, device=device),
            lengths=torch.zeros(kinds, LENGTHS, dtype=torch.int64, device=device),
            padding_R=torch.zeros(rows, dtype=torch.int32, device=device),
        )


@triton.jit
def _of_context(
    q_ptr, table_ptr, lengths_ptr, padding_ptr, out_ptr, lse_ptr, g, tile, number,
    layer, scale, softcap, window, rows, queries, splits, runs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attend to one run of the context's keys, for a tile of all rows together."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    STORED: tl.constexpr = tl.float8e4nv if FP8 else DTYPE
    tokens = tl.load(lengths_ptr).to(tl.int32)
    # Query rows are ordered by batch row, query and head of the group.
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m // (queries * GROUP)
    query = m // GROUP % queries
    row_mask = m < rows * queries * GROUP
    at_M = ((row * queries + query) * HEADS + g * GROUP + m % GROUP).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask_MD = row_mask[:, None] & (d < D)[None, :]
    q_MD = tl.load(q_ptr + at_M[:, None] * D + d[None, :], mask=mask_MD, other=0.0)

    # Each row sees the keys from `first` on.
    first_M = m * 0
    length = tl.cdiv(tl.cdiv(tokens, splits), BLOCK_N) * BLOCK_N
    start = number * length
    stop = tl.minimum(start + length, tokens)
    if WINDOW:
        # The first visible position, and with it the first visible key of the shard, whose segments
        # are in the order of their positions.
        padding = tl.load(padding_ptr + row, mask=row_mask, other=0)
        position = tl.load(lengths_ptr + 3) + tl.load(lengths_ptr + 1) + query - padding
        in_context = position - window + 1
        in_shard = tl.zeros_like(in_context)
        for segment in tl.range(0, tl.load(lengths_ptr + 5)):
            lowest = tl.load(lengths_ptr + _SEGMENTS + 2 * segment)
            size = tl.load(lengths_ptr + _SEGMENTS + 2 * segment + 1) - lowest
            in_shard += tl.minimum(tl.maximum(in_context - lowest, 0), size)
        first_M = in_shard.to(tl.int32)
        needed = tl.min(tl.where(row_mask, first_M, tokens))
        start = tl.maximum(start, needed // BLOCK_N * BLOCK_N)

    address_ptr = table_ptr + layer * COLUMNS
    # Addresses read on the device do not imply an alignment, and unaligned loads are slow.
    base = tl.multiple_of(g.to(tl.int64) * tokens * D, 16)
    k_ptr = tl.load(address_ptr).to(tl.pointer_type(STORED)) + base
    v_ptr = tl.load(address_ptr + 1).to(tl.pointer_type(STORED)) + base
    k_scale_ptr = tl.load(address_ptr + 4).to(tl.pointer_type(tl.float32)) + g * tokens
    v_scale_ptr = tl.load(address_ptr + 5).to(tl.pointer_type(tl.float32)) + g * tokens
    out_MD, lse_M = run(
        q_MD, tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16), k_scale_ptr, v_scale_ptr,
        first_M, first_M, start, stop, scale, softcap,
        D, BLOCK_M, BLOCK_N, BLOCK_D, SOFTCAP, WINDOW, False, PRECISION, FP8,
    )  # fmt: skip
    place_M = at_M * runs + number
    tl.store(out_ptr + place_M[:, None] * D + d[None, :], out_MD, mask=mask_MD)
    tl.store(lse_ptr + place_M, lse_M, mask=row_mask)


@triton.jit
def _of_tail(
    q_ptr, table_ptr, lengths_ptr, padding_ptr, out_ptr, lse_ptr, g, row, tile, number,
    layer, scale, softcap, window, queries, splits, runs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    TAIL_SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to one run of a row's tail, which holds the new keys already."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    before = tl.load(lengths_ptr + 1).to(tl.int32)
    capacity = tl.load(lengths_ptr + 2)
    tokens = tl.where(tl.load(lengths_ptr + 4) != 0, before + queries, 0)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = m // GROUP
    row_mask = m < queries * GROUP
    at_M = ((row * queries + query) * HEADS + g * GROUP + m % GROUP).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask_MD = row_mask[:, None] & (d < D)[None, :]
    q_MD = tl.load(q_ptr + at_M[:, None] * D + d[None, :], mask=mask_MD, other=0.0)

    # Each row sees the keys from `first` on, up to its own.
    last_M = before + query
    first_M = tl.load(padding_ptr + row) + m * 0
    if WINDOW:
        first_M = tl.maximum(first_M, last_M - window + 1)
    length = tl.cdiv(tl.cdiv(tokens, TAIL_SPLITS), BLOCK_N) * BLOCK_N
    start = number * length
    stop = tl.minimum(start + length, tokens)
    if WINDOW:
        needed = tl.min(tl.where(row_mask, first_M, tokens))
        start = tl.maximum(start, needed // BLOCK_N * BLOCK_N)
    base = tl.multiple_of((row * KV_HEADS + g) * capacity * D, 16)
    address_ptr = table_ptr + layer * COLUMNS + 2
    k_ptr = tl.load(address_ptr).to(tl.pointer_type(DTYPE)) + base
    v_ptr = tl.load(address_ptr + 1).to(tl.pointer_type(DTYPE)) + base
    out_MD, lse_M = run(
        q_MD, tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16), k_ptr, v_ptr,
        first_M, last_M, start, stop, scale, softcap,
        D, BLOCK_M, BLOCK_N, BLOCK_D, SOFTCAP, True, True, PRECISION, False,
    )  # fmt: skip
    place_M = at_M * runs + splits + number
    tl.store(out_ptr + place_M[:, None] * D + d[None, :], out_MD, mask=mask_MD)
    tl.store(lse_ptr + place_M, lse_M, mask=row_mask)


@triton.jit
def _runs(
    q_ptr, table_ptr, lengths_ptr, padding_ptr, out_ptr, lse_ptr,
    layer, scale, softcap, window,
    rows, queries, tiles, tail_tiles, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    TAIL_SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    triton_pdl.begin(PDL)
    g = tl.program_id(0)
    part = tl.program_id(1)
    runs = splits + TAIL_SPLITS
    # The context comes first: its runs take longer.
    if part < splits * tiles:
        _of_context(
            q_ptr, table_ptr, lengths_ptr, padding_ptr, out_ptr, lse_ptr,
            g, part // splits, part % splits,
            layer, scale, softcap, window, rows, queries, splits, runs,
            HEADS, KV_HEADS, D, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_D,
            SOFTCAP, WINDOW, PRECISION, FP8,
        )  # fmt: skip
    else:
        at = part - splits * tiles
        _of_tail(
            q_ptr, table_ptr, lengths_ptr, padding_ptr, out_ptr, lse_ptr,
            g, at // TAIL_SPLITS // tail_tiles, at // TAIL_SPLITS % tail_tiles, at % TAIL_SPLITS,
            layer, scale, softcap, window, queries, splits, runs,
            HEADS, KV_HEADS, D, TAIL_SPLITS, COLUMNS, TAIL_M, BLOCK_N, BLOCK_D,
            SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip


def addresses(layers: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Return the addresses for `KVTables`, on the CPU, with zeros for missing tensors.

    Args:
        layers: tensors of each layer, in the order of the columns; None for one that is missing.
    """
    rows = [[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in layers]
    return torch.tensor([row + [0] * (COLUMNS - len(row)) for row in rows], device="cpu")


def lengths(
    segments: Sequence[tuple[int, int]],
    *,
    context_tokens: int,
    tail_tokens: int,
    capacity: int,
    holds_tail: bool = True,
) -> Tensor:
    """Return the lengths for `KVTables`, on the CPU: `[LENGTHS]`.

    Those are the tokens kept, the tail's before the new ones, the tail's capacity, the whole
    context's tokens, whether this rank attends to the tail, the number of segments, and these.

    Args:
        segments: context tokens that layers of a kind keep, in the order in which they are stored
            and of their positions; `MAX_SEGMENTS` at most.
        context_tokens: tokens of the whole context.
        tail_tokens: tokens of the tail before the new ones.
        capacity: tokens for which the tail has room.
        holds_tail: True if this rank attends to the tail.
    """
    # A key without room is not stored.
    assert tail_tokens < capacity, f"a tail of {tail_tokens} tokens has room for {capacity}"
    shard_tokens = sum(stop - start for start, stop in segments)
    values = [shard_tokens, tail_tokens, capacity, context_tokens, int(holds_tail), len(segments)]
    values += [edge for segment in segments for edge in segment]
    return torch.tensor(values + [0] * (LENGTHS - len(values)), device="cpu")


def append(k_RGQD: Tensor, v_RGQD: Tensor, *, tables: KVTables, layer: int) -> None:
    """Write new keys and values after each row's tail, which has room for them.

    Args:
        k_RGQD: keys.
        v_RGQD: values.
        tables: where the tail is.
        layer: row of the addresses.
    """
    tails_of(tables, layer).store(None, k_RGQD.transpose(1, 2), v_RGQD.transpose(1, 2), None)


def tails_of(tables: KVTables, layer: int) -> Tails:
    """Return where a layer's new keys and values go."""
    return Tails(
        addresses=tables.addresses,
        numbers=tables.lengths[0],
        first=layer * COLUMNS + 2,
        by_row=False,
    )


def attend_runs(
    q_RQHD: Tensor,
    kv_heads: int,
    *,
    tables: KVTables,
    layer: int,
    rule: Rule,
    kind: int = 0,
    fp8: bool = False,
    splits: int | None = None,
    **options: Any,
) -> Runs:
    """Compute attention of new tokens over the shard and, where this rank holds it, their tail.

    Call `append` first: a query sees itself in the tail. Results of queries that are padding are
    meaningless; a query that sees no key here gets zeros and an lse of -inf.

    Args:
        q_RQHD: queries.
        kv_heads: heads of keys and values.
        tables: where context and tail are.
        layer, kind: rows of the addresses and of the lengths.
        rule: scale, window, softcap, and the precision of the result.
        fp8: True if the context is in e4m3 with scales; the tail is in the queries' precision.
        splits: runs over the context, `SPLITS` by default.
        options: instead of `launch_options`.
    """
    R, Q, H, D = q_RQHD.shape
    q_RQHD = q_RQHD.contiguous()
    row, block_d = Q * H // kv_heads, max(16, triton.next_power_of_2(D))
    block_m, tail_m = (_tile_size(size, D, q_RQHD.dtype) for size in (R * row, row))
    tiles, tail_tiles = triton.cdiv(R * row, block_m), triton.cdiv(row, tail_m)
    splits = splits or SPLITS
    # Several tiles make programs enough, and every run more is a partial result to merge.
    if tiles > 1:
        splits = max(min(4, splits), splits // tiles)
    runs = splits + TAIL_SPLITS
    out, lse = (
        torch.empty(shape, dtype=torch.float32, device=q_RQHD.device)
        for shape in ((R, Q, H, runs, D), (R, Q, H, runs))
    )
    if q_RQHD.element_size() == 2 and not fp8:
        # As measured on an H200. Tiles are fewer than those of rows, so that large ones are alone
        # on their multiprocessor and gain by more keys on the way.
        options = dict(num_stages=4 if block_m > 64 else 3, maxnreg=None) | options
    early = triton_pdl.options(q_RQHD.device)
    _runs[(kv_heads, splits * tiles + R * tail_tiles * TAIL_SPLITS)](
        q_RQHD, tables.addresses, tables.lengths[kind], tables.padding_R, out, lse,
        layer, rule.scale, rule.softcap or 0.0, rule.window or 0,
        R, Q, tiles, tail_tiles, splits,
        HEADS=H, KV_HEADS=kv_heads, D=D, TAIL_SPLITS=TAIL_SPLITS, COLUMNS=COLUMNS,
        BLOCK_M=block_m, TAIL_M=tail_m, BLOCK_D=block_d,
        SOFTCAP=rule.softcap is not None, WINDOW=rule.window is not None,
        PRECISION="ieee" if q_RQHD.dtype == torch.float32 else "tf32", FP8=fp8,
        **early, **(launch_options(block_m, D, q_RQHD.dtype, fp8=fp8) | options),
    )  # fmt: skip
    return Runs(
        shape=(R, Q, H, D),
        out_PD=out,
        lse_P=lse,
        count=runs,
        merged=lambda: merge_runs(out, lse, rule.dtype or torch.float32),
    )


def attend(q_RQHD: Tensor, kv_heads: int, **options: Any) -> State:
    """Do as `attend_runs` does, and merge the runs."""
    return attend_runs(q_RQHD, kv_heads, **options).merged()


def merge_runs(out_RQHSD: Tensor, lse_RQHS: Tensor, dtype: torch.dtype) -> State:
    """Merge the runs of each query and head, in a result of that precision."""
    R, Q, H, runs, D = out_RQHSD.shape
    device = out_RQHSD.device
    out_RQHD = torch.empty(R, Q, H, D, dtype=dtype, device=device)
    lse_RQH = torch.empty(R, Q, H, dtype=torch.float32, device=device)
    merged[(R * Q * H, triton.cdiv(D, _MERGED_D))](
        out_RQHSD, lse_RQHS, out_RQHD, lse_RQH, runs,
        D=D, BLOCK_D=_MERGED_D, BLOCK_S=triton.next_power_of_2(runs), num_warps=2,
        **triton_pdl.options(device),
    )  # fmt: skip
    return State(out_RQHD, lse_RQH)


def _tile_size(query_rows: int, head_size: int, dtype: torch.dtype) -> int:
    """Return the query rows of a tile, of which registers hold the results."""
    largest = 128 if dtype.itemsize == 2 and head_size <= 128 else 64
    return min(largest, tile_size(query_rows, 1))
