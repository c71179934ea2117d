"""Phase 2's attention over MLA's compressed keys in Triton, as `triton_answer` does over others.

The one head's key is `[c, r]`, and its value is `c` again (`attention.latent`). So a step reads `c`
once, for the scores and for the results of all query heads, which are rows of one tile. Tables,
runs and ranks are those of `triton_answer`; the table has `c` in the place of keys, and `r` in that
of values.

Axes: R batch rows, Q new tokens of each, H query heads, M query rows of a tile, C compressed size,
P rotary size, E elements of an absorbed query (C + P), N keys of one step, S runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import triton_pdl
from star_attention.attention.kernels.row_tables import tile_size
from star_attention.attention.kernels.triton_answer import COLUMNS, KVTables
from star_attention.attention.kernels.triton_run import (
    from_fp8,
    load,
    merged,
    query_factor,
    weight_factor,
)
from star_attention.attention.state import State

MOST_COMPRESSED = 512
"""Largest compressed size: registers hold a tile's results."""
TAIL_SPLITS = 4
"""Runs over each row's tail."""
SPLITS = 128
"""Runs over the context. There is one head: a program for each multiprocessor of a large GPU."""
_LARGEST_TILES = {2: 64, 4: 16}
"""Query rows of a tile at most, by the bytes of an element: shared memory holds them."""
_MERGED_C = 64
"""Elements of a result that a program of the merge holds, of all runs."""

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def store_new(
    c_ptr, r_ptr, address_ptr, slot,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write a new compressed key and its rotary part into a slot of a layer's tail."""
    DTYPE: tl.constexpr = c_ptr.dtype.element_ty
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c_C, r_P = tl.load(c_ptr + c, mask=c < C), tl.load(r_ptr + p, mask=p < P)
    tail_ptr = address_ptr + 2
    tl.store(tl.load(tail_ptr).to(tl.pointer_type(DTYPE)) + slot * C + c, c_C, mask=c < C)
    tl.store(tl.load(tail_ptr + 1).to(tl.pointer_type(DTYPE)) + slot * P + p, r_P, mask=p < P)


@triton.jit
def _append(
    c_ptr, r_ptr, table_ptr, lengths_ptr, c_row, c_q, r_row, r_q, layer, queries,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    triton_pdl.begin(PDL)
    at = tl.program_id(0)
    q = at % queries
    row = at // queries
    slot = row * tl.load(lengths_ptr + 2) + tl.load(lengths_ptr + 1) + q
    store_new(
        c_ptr + row * c_row + q * c_q, r_ptr + row * r_row + q * r_q,
        table_ptr + layer * COLUMNS, slot, C, P, BLOCK_C, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _step(
    q_MC, odd_q_MC, q_MP, c_ptr, r_ptr, c_scale_ptr, r_scale_ptr, first_M, last_M, at, stop,
    top_M, sum_MN, out_MC, odd_MC, scale, q_factor, factor,
    C: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, LIMITS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attend to keys `at` to `at + BLOCK_N`, of which those before `stop` count if `MASKED`."""
    DTYPE: tl.constexpr = q_MC.dtype
    n = at + tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    r_NP = load(r_ptr, n, p, stop, P, BLOCK_P, MASKED).to(DTYPE)
    scores_MN = tl.dot(q_MP, tl.trans(r_NP), input_precision=PRECISION)
    if FP8:
        # Two elements at a time: single bytes would come from shared memory one by one.
        pair_ptr = c_ptr.to(tl.pointer_type(tl.int16))
        c = tl.arange(0, BLOCK_C // 2)
        pair_NC = load(pair_ptr, n, c, stop, C // 2, BLOCK_C // 2, MASKED)
        c_NC, odd_c_NC = from_fp8(pair_NC & 0xFF, DTYPE), from_fp8(pair_NC >> 8, DTYPE)
        c_scale_N = tl.load(c_scale_ptr + n, mask=n < stop, other=0.0)
        r_scale_N = tl.load(r_scale_ptr + n, mask=n < stop, other=0.0)
        even_MN = tl.dot(q_MC, tl.trans(c_NC), input_precision=PRECISION)
        odd_MN = tl.dot(odd_q_MC, tl.trans(odd_c_NC), input_precision=PRECISION)
        scores_MN = scores_MN * (r_scale_N * q_factor)[None, :]
        scores_MN += (even_MN + odd_MN) * (c_scale_N * q_factor)[None, :]
    else:
        c_NC = load(c_ptr, n, tl.arange(0, BLOCK_C), stop, C, BLOCK_C, MASKED)
        scores_MN += tl.dot(q_MC, tl.trans(c_NC), input_precision=PRECISION)
    if MASKED:
        scores_MN = tl.where((n < stop)[None, :], scores_MN, float("-inf"))
    if LIMITS:
        visible = (n[None, :] >= first_M[:, None]) & (n[None, :] <= last_M[:, None])
        scores_MN = tl.where(visible, scores_MN, float("-inf"))
    new_M = tl.maximum(top_M, tl.max(scores_MN, 1) * scale * _LOG2_E)
    safe_M = tl.where(new_M == float("-inf"), 0.0, new_M) if LIMITS else new_M
    shrink_M = tl.exp2(top_M - safe_M)
    weight_MN = tl.exp2(scores_MN * (scale * _LOG2_E) - safe_M[:, None])
    # A sum over keys waits for all warps: it comes once, after the last step.
    sum_MN = sum_MN * shrink_M[:, None] + weight_MN
    out_MC *= shrink_M[:, None]
    if FP8:
        weight_MN = weight_MN * (c_scale_N * factor)[None, :]
        odd_MC *= shrink_M[:, None]
        odd_MC = tl.dot(weight_MN.to(DTYPE), odd_c_NC, acc=odd_MC, input_precision=PRECISION)
    out_MC = tl.dot(weight_MN.to(DTYPE), c_NC, acc=out_MC, input_precision=PRECISION)
    return new_M, sum_MN, out_MC, odd_MC


@triton.jit
def _run(
    q_MC, odd_q_MC, q_MP, c_ptr, r_ptr, c_scale_ptr, r_scale_ptr, first_M, last_M,
    start, stop, scale,
    C: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LIMITS: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attend to keys `start` to `stop`; return results and log2-sum-exps.

    With `LIMITS`, a row sees the keys from its `first_M` to its `last_M`.
    """
    q_factor, factor = 1.0, 1.0
    if FP8:
        factor = weight_factor(c_scale_ptr, start, stop)
        if q_MC.dtype != tl.float32:
            q_MC, odd_q_MC = q_MC.to(tl.float32), odd_q_MC.to(tl.float32)
            q_MP = q_MP.to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(q_MC)), tl.max(tl.abs(odd_q_MC)))
            q_factor = query_factor(tl.maximum(largest, tl.max(tl.abs(q_MP))))
            q_MC = (q_MC / q_factor).to(tl.float16)
            odd_q_MC = (odd_q_MC / q_factor).to(tl.float16)
            q_MP = (q_MP / q_factor).to(tl.float16)
    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_MN = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    # In fp8, even and odd elements are summed apart.
    out_MC = tl.full((BLOCK_M, BLOCK_C // 2 if FP8 else BLOCK_C), 0.0, tl.float32)
    odd_MC = tl.full((BLOCK_M, BLOCK_C // 2 if FP8 else 1), 0.0, tl.float32)
    # Only the last keys need a mask.
    masked_from = start + tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N
    for at in tl.range(start, masked_from, BLOCK_N):
        top_M, sum_MN, out_MC, odd_MC = _step(
            q_MC, odd_q_MC, q_MP, c_ptr, r_ptr, c_scale_ptr, r_scale_ptr, first_M, last_M, at, stop,
            top_M, sum_MN, out_MC, odd_MC, scale, q_factor, factor,
            C, P, BLOCK_N, BLOCK_C, BLOCK_P, LIMITS, False, PRECISION, FP8,
        )  # fmt: skip
    # One step at most. Stages of its own would take shared memory beside those of the loop before.
    for at in tl.range(masked_from, stop, BLOCK_N, num_stages=1):
        top_M, sum_MN, out_MC, odd_MC = _step(
            q_MC, odd_q_MC, q_MP, c_ptr, r_ptr, c_scale_ptr, r_scale_ptr, first_M, last_M, at, stop,
            top_M, sum_MN, out_MC, odd_MC, scale, q_factor, factor,
            C, P, BLOCK_N, BLOCK_C, BLOCK_P, LIMITS, True, PRECISION, FP8,
        )  # fmt: skip
    if FP8:
        out_MC = tl.reshape(tl.join(out_MC, odd_MC), (BLOCK_M, BLOCK_C)) / factor
    sum_M = tl.sum(sum_MN, 1)
    has_keys_M = sum_M > 0.0
    sum_M = tl.where(has_keys_M, sum_M, 1.0)
    lse_M = tl.where(has_keys_M, top_M + tl.log2(sum_M), float("-inf"))
    return out_MC / sum_M[:, None], lse_M


@triton.jit
def _queries(q_at_M, row_mask, first, stop, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Load `SIZE` elements of each query, every `STEP`th from `first` on, those before `stop`."""
    e = first + STEP * tl.arange(0, SIZE)
    mask = row_mask[:, None] & (e < stop)[None, :]
    return tl.load(q_at_M[:, None] + e[None, :], mask=mask, other=0.0)


@triton.jit
def _piece(
    q_at_M, address_ptr, scales_ptr, slot, tokens, number, pieces, first_M, last_M, scale,
    out_ptr, lse_ptr, place_M, row_mask,
    C: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LIMITS: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attend to one of several runs of `tokens` keys, which begin at a slot of the buffers."""
    STORED: tl.constexpr = tl.float8e4nv if FP8 else q_at_M.dtype.element_ty
    length = tl.cdiv(tl.cdiv(tokens, pieces), BLOCK_N) * BLOCK_N
    start = number * length
    c_ptr = tl.load(address_ptr).to(tl.pointer_type(STORED))
    r_ptr = tl.load(address_ptr + 1).to(tl.pointer_type(STORED))
    if C % 16 == 0 and P % 16 == 0:
        # Addresses read on the device do not imply an alignment, and unaligned loads are slow. It
        # is said before the slot is added: a sum with a slot that is always 0 would not keep it.
        c_ptr, r_ptr = tl.multiple_of(c_ptr, 16), tl.multiple_of(r_ptr, 16)
    c_ptr, r_ptr = c_ptr + slot * C, r_ptr + slot * P
    if FP8:
        q_MC = _queries(q_at_M, row_mask, 0, C, BLOCK_C // 2, 2)
        odd_q_MC = _queries(q_at_M, row_mask, 1, C, BLOCK_C // 2, 2)
    else:
        q_MC = _queries(q_at_M, row_mask, 0, C, BLOCK_C, 1)
        odd_q_MC = q_MC
    out_MC, lse_M = _run(
        q_MC, odd_q_MC, _queries(q_at_M, row_mask, C, C + P, BLOCK_P, 1), c_ptr, r_ptr,
        tl.load(scales_ptr).to(tl.pointer_type(tl.float32)),
        tl.load(scales_ptr + 1).to(tl.pointer_type(tl.float32)),
        first_M, last_M, start, tl.minimum(start + length, tokens), scale,
        C, P, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_P, LIMITS, PRECISION, FP8,
    )  # fmt: skip
    c = tl.arange(0, BLOCK_C)
    mask_MC = row_mask[:, None] & (c < C)[None, :]
    tl.store(out_ptr + place_M[:, None] * C + c[None, :], out_MC, mask=mask_MC)
    tl.store(lse_ptr + place_M, lse_M, mask=row_mask)


@triton.jit
def _runs(
    q_ptr, table_ptr, lengths_ptr, padding_ptr, out_ptr, lse_ptr, layer, scale,
    rows, queries, tiles, tail_tiles, splits,
    HEADS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, TAIL_SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    triton_pdl.begin(PDL)
    part = tl.program_id(0)
    # The context comes first, whose runs take longer: for all rows together, then each row's tail.
    of_context = part < splits * tiles
    after = part - splits * tiles
    number = tl.where(of_context, part % splits, after % TAIL_SPLITS)
    tile = tl.where(of_context, part // splits, after // TAIL_SPLITS % tail_tiles)
    tail_row = tl.where(of_context, 0, after // TAIL_SPLITS // tail_tiles)
    # Query rows are ordered by batch row, query and head.
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tail_row + m // (queries * HEADS)
    query = m // HEADS % queries
    row_mask = m < tl.where(of_context, rows, 1) * queries * HEADS
    at_M = ((row * queries + query) * HEADS + m % HEADS).to(tl.int64)
    q_at_M = q_ptr + at_M * (C + P)
    address_ptr = table_ptr + layer * COLUMNS
    before = tl.load(lengths_ptr + 1).to(tl.int32)
    first_M = tl.load(padding_ptr + row, mask=row_mask, other=0)
    place_M = at_M * (splits + TAIL_SPLITS) + number
    if of_context:
        _piece(
            q_at_M, address_ptr, address_ptr + 4, 0,
            tl.load(lengths_ptr).to(tl.int32), number, splits,
            first_M, before + query, scale, out_ptr, lse_ptr, place_M, row_mask,
            C, P, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_P, False, PRECISION, FP8,
        )  # fmt: skip
    else:
        _piece(
            q_at_M, address_ptr + 2, address_ptr + 4, tail_row * tl.load(lengths_ptr + 2),
            tl.where(tl.load(lengths_ptr + 4) != 0, before + queries, 0), number, TAIL_SPLITS,
            first_M, before + query, scale, out_ptr, lse_ptr, place_M + splits, row_mask,
            C, P, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_P, True, PRECISION, False,
        )  # fmt: skip


def append(c_R1QC: Tensor, r_R1QP: Tensor, *, tables: KVTables, layer: int) -> None:
    """Write new compressed keys after each row's tail, which has room for them.

    Args:
        c_R1QC: what is compressed.
        r_R1QP: rotary parts of the keys.
        tables: where the tail is.
        layer: row of the addresses.
    """
    R, _, Q, C = c_R1QC.shape
    P = r_R1QP.shape[3]
    c_R1QC, r_R1QP = (t if t.stride(3) == 1 else t.contiguous() for t in (c_R1QC, r_R1QP))
    _append[(R * Q,)](
        c_R1QC, r_R1QP, tables.addresses, tables.lengths[0],
        c_R1QC.stride(0), c_R1QC.stride(2), r_R1QP.stride(0), r_R1QP.stride(2), layer, Q,
        C=C, P=P, BLOCK_C=triton.next_power_of_2(C), BLOCK_P=triton.next_power_of_2(P),
        COLUMNS=COLUMNS, num_warps=1, **triton_pdl.options(c_R1QC.device),
    )  # fmt: skip


def attend(
    q_RQHE: Tensor,
    compressed_size: int,
    *,
    tables: KVTables,
    layer: int,
    rule: Rule,
    fp8: bool = False,
    splits: int | None = None,
    **options: Any,
) -> State:
    """Compute attention of new tokens over the shard and, where this rank holds it, their tail.

    Call `append` first: a query sees itself in the tail. Results of queries that are padding are
    meaningless; a query that sees no key here gets zeros and an lse of -inf.

    Args:
        q_RQHE: absorbed queries (`attention.latent.Expansion.absorb`).
        compressed_size: C, `MOST_COMPRESSED` at most.
        tables: where context and tail are.
        layer: row of the addresses.
        rule: the scale; no window and no softcap.
        fp8: True if the context is in e4m3 with scales, False if it is in the queries' precision,
            as the tail always is.
        splits: runs over the context, `SPLITS` by default.
        options: of Triton's launch, instead of ours.

    Returns:
        The state over compressed values, in fp32.
    """
    assert rule.window is None and rule.softcap is None, (
        f"expected neither window nor softcap, got {rule}"
    )
    R, Q, H, E = q_RQHE.shape
    C, P = compressed_size, E - compressed_size
    q_RQHE = q_RQHE.contiguous()
    nbytes = q_RQHE.element_size()
    block_m = min(_LARGEST_TILES[nbytes], tile_size(R * Q * H, 1))
    tiles, tail_tiles = triton.cdiv(R * Q * H, block_m), triton.cdiv(Q * H, block_m)
    splits = splits or SPLITS
    # Several tiles make programs enough, and every run more is a partial result to merge.
    if tiles > 1:
        splits = max(min(4, splits), splits // tiles)
    runs = splits + TAIL_SPLITS
    fp32: dict[str, Any] = dict(dtype=torch.float32, device=q_RQHE.device)
    out, lse = torch.empty(R, Q, H, runs, C, **fp32), torch.empty(R, Q, H, runs, **fp32)
    early = triton_pdl.options(q_RQHE.device)
    # With half of the warps, registers do not hold a tile's results. Shared memory holds the
    # queries and the keys of a few steps, or of one with large elements.
    launch = dict(num_warps=8, num_stages=3 if nbytes == 2 else 2)
    launch["BLOCK_N"] = 64 if nbytes == 2 and block_m == 16 else 32
    _runs[(splits * tiles + R * tail_tiles * TAIL_SPLITS,)](
        q_RQHE, tables.addresses, tables.lengths[0], tables.padding_R, out, lse, layer, rule.scale,
        R, Q, tiles, tail_tiles, splits,
        HEADS=H, C=C, P=P, TAIL_SPLITS=TAIL_SPLITS, COLUMNS=COLUMNS,
        BLOCK_M=block_m, BLOCK_C=max(32, triton.next_power_of_2(C)),
        BLOCK_P=max(16, triton.next_power_of_2(P)),
        PRECISION="ieee" if q_RQHE.dtype == torch.float32 else "tf32", FP8=fp8,
        **early, **(launch | options),
    )  # fmt: skip
    out_RQHC, lse_RQH = torch.empty(R, Q, H, C, **fp32), torch.empty(R, Q, H, **fp32)
    merged[(R * Q * H, triton.cdiv(C, _MERGED_C))](
        out, lse, out_RQHC, lse_RQH, runs,
        D=C, BLOCK_D=_MERGED_C, BLOCK_S=triton.next_power_of_2(runs), num_warps=4, **early,
    )  # fmt: skip
    return State(out_RQHC, lse_RQH)
