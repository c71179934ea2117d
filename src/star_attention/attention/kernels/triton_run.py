"""Attention of a tile of query rows to one run of keys, in Triton: the loop of `triton_answer` and
`triton_rows`, and the merge of the runs of a query.

Axes: M query rows of a tile, D head size, N keys of one step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from star_attention.attention.kernels import triton_pdl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# In fp8, queries and weights times scales are made as large as these in fp16, whose range is small.
_LARGEST_Q: tl.constexpr = tl.constexpr(1024.0)
_LARGEST_WEIGHT: tl.constexpr = tl.constexpr(32768.0)
# Scales read at once, to find the largest of a run.
_SCALES: tl.constexpr = tl.constexpr(2048)
# Head size for which keys and values in fp8 become fp16, values two at a time. With heads of 64 in
# bf16 that read wrong addresses on an H200 (NaN, or an illegal memory access), others did not run.
_PAIRED: tl.constexpr = tl.constexpr(128)
# Instead of a largest number of zero, by which nothing can be divided.
_TINY: tl.constexpr = tl.constexpr(1e-30)


@triton.jit
def load(ptr, n, d, stop, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Load rows `n` of `SIZE` elements, those before `stop` if `MASKED`."""
    place = n.to(tl.int64)[:, None] * SIZE + d[None, :]
    if MASKED:
        return tl.load(ptr + place, mask=(n < stop)[:, None] & (d < SIZE)[None, :], other=0.0)
    elif SIZE == BLOCK:
        return tl.load(ptr + place)
    else:
        return tl.load(ptr + place, mask=(d < SIZE)[None, :], other=0.0)


@triton.jit
def _step(
    q_MD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, first_M, last_M, at, stop,
    top_M, sum_MS, out_MD, odd_MD, scale, softcap, q_factor, v_factor,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to keys `at` to `at + BLOCK_N`, of which those before `stop` count if `MASKED`."""
    DTYPE: tl.constexpr = q_MD.dtype
    n = at + tl.arange(0, BLOCK_N)
    k_ND = load(k_ptr, n, tl.arange(0, BLOCK_D), stop, D, BLOCK_D, MASKED)
    scores_MN = tl.dot(q_MD, tl.trans(k_ND.to(DTYPE)), input_precision=PRECISION)
    if FP8:
        k_scale_N = tl.load(k_scale_ptr + n, mask=n < stop, other=0.0)
        scores_MN = scores_MN * (k_scale_N * q_factor)[None, :]
    if SOFTCAP:
        scores_MN = softcap * (2.0 * tl.sigmoid(2.0 * scale * scores_MN / softcap) - 1.0)
    if MASKED:
        scores_MN = tl.where((n < stop)[None, :], scores_MN, float("-inf"))
    if FIRST:
        scores_MN = tl.where(n[None, :] >= first_M[:, None], scores_MN, float("-inf"))
    if LAST:
        scores_MN = tl.where(n[None, :] <= last_M[:, None], scores_MN, float("-inf"))
    # The scale comes last: one multiplication and subtraction for each score.
    to_log2 = _LOG2_E if SOFTCAP else scale * _LOG2_E
    new_M = tl.maximum(top_M, tl.max(scores_MN, 1) * to_log2)
    safe_M = tl.where(new_M == float("-inf"), 0.0, new_M) if FIRST or LAST else new_M
    shrink_M = tl.exp2(top_M - safe_M)
    weight_MN = tl.exp2(scores_MN * to_log2 - safe_M[:, None])
    # A sum over keys waits for all warps: few rows have it once, after the last step.
    added_MS = weight_MN if sum_MS.shape[1] == BLOCK_N else tl.sum(weight_MN, 1, keep_dims=True)
    sum_MS = sum_MS * shrink_M[:, None] + added_MS
    out_MD *= shrink_M[:, None]
    if FP8:
        v_scale_N = tl.load(v_scale_ptr + n, mask=n < stop, other=0.0)
        weight_MN = (weight_MN * (v_scale_N * v_factor)[None, :]).to(DTYPE)
    if odd_MD.shape[1] > 1:
        # Two values at a time: single bytes would come from shared memory one by one.
        pair_ptr = v_ptr.to(tl.pointer_type(tl.int16))
        v_NP = load(pair_ptr, n, tl.arange(0, BLOCK_D // 2), stop, D // 2, BLOCK_D // 2, MASKED)
        even_NP, odd_NP = from_fp8(v_NP & 0xFF, DTYPE), from_fp8(v_NP >> 8, DTYPE)
        out_MD = tl.dot(weight_MN, even_NP, acc=out_MD, input_precision=PRECISION)
        odd_MD = odd_MD * shrink_M[:, None]
        odd_MD = tl.dot(weight_MN, odd_NP, acc=odd_MD, input_precision=PRECISION)
    else:
        v_ND = load(v_ptr, n, tl.arange(0, BLOCK_D), stop, D, BLOCK_D, MASKED)
        out_MD = tl.dot(weight_MN.to(DTYPE), v_ND.to(DTYPE), acc=out_MD, input_precision=PRECISION)
    return new_M, sum_MS, out_MD, odd_MD


@triton.jit
def from_fp8(byte, DTYPE: tl.constexpr):
    return byte.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)


@triton.jit
def weight_factor(scale_ptr, start, stop):
    """Return what makes weights times the scales of values as large as fp16 can hold."""
    largest = tl.zeros((_SCALES,), tl.float32)
    for at in tl.range(start, stop, _SCALES):
        n = at + tl.arange(0, _SCALES)
        largest = tl.maximum(largest, tl.load(scale_ptr + n, mask=n < stop, other=0.0))
    return _LARGEST_WEIGHT / tl.maximum(tl.max(largest), _TINY)


@triton.jit
def query_factor(largest):
    """Return what queries in fp32, `largest` at most, are divided by to be held in fp16.

    One instruction makes fp16 of two elements in e4m3; bf16 takes eight times as long. Divided by a
    power of two, queries in bf16 lose nothing in fp16.
    """
    largest = tl.maximum(largest, _TINY)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return power / _LARGEST_Q


@triton.jit
def run(
    q_MD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, first_M, last_M, start, stop, scale, softcap,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attend to keys `start` to `stop`; return results and log2-sum-exps.

    With `FIRST`, a row sees no keys before its `first_M`, and with `LAST` none after its `last_M`.
    """
    q_factor, v_factor = 1.0, 1.0
    PAIRS: tl.constexpr = FP8 and (D == _PAIRED or q_MD.dtype == tl.float32)
    if FP8:
        v_factor = weight_factor(v_scale_ptr, start, stop)
        if PAIRS and q_MD.dtype != tl.float32:
            q_MD = q_MD.to(tl.float32)
            q_factor = query_factor(tl.max(tl.abs(q_MD)))
            q_MD = (q_MD / q_factor).to(tl.float16)
    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_MS = tl.full((BLOCK_M, BLOCK_N if BLOCK_M == 16 else 1), 0.0, tl.float32)
    # In fp8, even and odd elements of the values are summed apart.
    out_MD = tl.full((BLOCK_M, BLOCK_D // 2 if PAIRS else BLOCK_D), 0.0, tl.float32)
    odd_MD = tl.full((BLOCK_M, BLOCK_D // 2 if PAIRS else 1), 0.0, tl.float32)
    masked_from = start
    if not FIRST and not LAST:
        # Masks cost as much as the rest of a step: only the last keys need them.
        masked_from = start + tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N
        for at in tl.range(start, masked_from, BLOCK_N):
            top_M, sum_MS, out_MD, odd_MD = _step(
                q_MD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, first_M, last_M, at, stop,
                top_M, sum_MS, out_MD, odd_MD, scale, softcap, q_factor, v_factor,
                D, BLOCK_N, BLOCK_D, SOFTCAP, FIRST, LAST, PRECISION, FP8, False,
            )  # fmt: skip
    # Short runs: fewer keys on the way leave shared memory for more programs.
    STAGES: tl.constexpr = None if FIRST and not LAST else 2
    for at in tl.range(masked_from, stop, BLOCK_N, num_stages=STAGES):
        top_M, sum_MS, out_MD, odd_MD = _step(
            q_MD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, first_M, last_M, at, stop,
            top_M, sum_MS, out_MD, odd_MD, scale, softcap, q_factor, v_factor,
            D, BLOCK_N, BLOCK_D, SOFTCAP, FIRST, LAST, PRECISION, FP8, True,
        )  # fmt: skip
    if PAIRS:
        out_MD = tl.reshape(tl.join(out_MD, odd_MD), (BLOCK_M, BLOCK_D))
    if FP8:
        out_MD = out_MD / v_factor
    sum_M = tl.sum(sum_MS, 1)
    has_keys_M = sum_M > 0.0
    sum_M = tl.where(has_keys_M, sum_M, 1.0)
    lse_M = tl.where(has_keys_M, top_M + tl.log2(sum_M), float("-inf"))
    return out_MD / sum_M[:, None], lse_M


@triton.jit
def merged(
    out_ptr, lse_ptr, result_ptr, result_lse_ptr, runs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the runs of each query and head; a program has `BLOCK_D` elements of the results."""
    triton_pdl.begin(PDL)
    at = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # All is read at once.
    lse_S = tl.load(lse_ptr + at * runs + s, mask=s < runs, other=float("-inf"))
    mask_SD = (s < runs)[:, None] & (d < D)[None, :]
    out_SD = tl.load(out_ptr + (at * runs + s)[:, None] * D + d[None, :], mask=mask_SD, other=0.0)
    # A rank may hold no keys that a query sees.
    top = tl.max(lse_S)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_S = tl.exp2(lse_S - top)
    weights = tl.sum(weight_S)
    has_keys = weights > 0.0
    weights = tl.where(has_keys, weights, 1.0)
    tl.store(result_ptr + at * D + d, tl.sum(out_SD * weight_S[:, None], 0) / weights, mask=d < D)
    lse = tl.where(has_keys, (top + tl.log2(weights)) / _LOG2_E, float("-inf"))
    tl.store(result_lse_ptr + at, lse, mask=tl.program_id(1) == 0)


@triton.jit
def merged_tile(
    out_ptr, lse_ptr, rows_ptr, row_R, inside_R, d, runs, tails_at,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    ROW_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the runs of some rows, each of them one head of a query; return states in fp32.

    With a `TILE`, runs are those of `triton_rows`, where `rows_ptr` says; else a row's runs are one
    after the other.

    Args:
        row_R: numbers of the rows, of which those count that are `inside_R`.
        d: elements of the results.
    """
    items_R, first_R, tail_R = row_R * 0, row_R * 0, row_R * runs
    if TILE:
        # The runs over a row's context, and from place `tails_at` those over its tail.
        GROUP: tl.constexpr = HEADS // KV_HEADS
        h_R = row_R % HEADS
        row_ptr = rows_ptr + row_R // HEADS * ROW_COLUMNS
        items_R = tl.load(row_ptr + 4, mask=inside_R, other=0)
        first_R = tl.load(row_ptr + 3, mask=inside_R, other=0) * KV_HEADS + h_R // GROUP
        place_R = tl.load(row_ptr + 5, mask=inside_R, other=0)
        first_R = first_R * TILE + place_R * GROUP + h_R % GROUP
        tail_R = tails_at + row_R // HEADS * runs * HEADS + h_R
    # From one run of a row to the next.
    STEP: tl.constexpr = KV_HEADS * TILE
    TAIL_STEP: tl.constexpr = HEADS if TILE else 1
    top_R = tl.full(row_R.shape, float("-inf"), tl.float32)
    sum_R = tl.zeros(row_R.shape, tl.float32)
    out_RD = tl.zeros((row_R.shape[0], BLOCK_D), tl.float32)
    count_R = tl.where(inside_R, items_R + runs, 0)
    for chunk in tl.range(0, tl.max(count_R), BLOCK_S):
        s = chunk + tl.arange(0, BLOCK_S)
        after_RS = s[None, :] - items_R[:, None]
        of_item_RS = first_R[:, None] + s[None, :] * STEP
        of_tail_RS = tail_R[:, None] + after_RS * TAIL_STEP
        place_RS = tl.where(after_RS < 0, of_item_RS, of_tail_RS).to(tl.int64)
        mask_RS = s[None, :] < count_R[:, None]
        lse_RS = tl.load(lse_ptr + place_RS, mask=mask_RS, other=float("-inf"))
        mask_RSD = mask_RS[:, :, None] & (d < D)[None, None, :]
        out_RSD = tl.load(
            out_ptr + place_RS[:, :, None] * D + d[None, None, :], mask=mask_RSD, other=0.0
        )
        new_R = tl.maximum(top_R, tl.max(lse_RS, 1))
        # There may be no keys that a query sees.
        safe_R = tl.where(new_R == float("-inf"), 0.0, new_R)
        shrink_R = tl.exp2(top_R - safe_R)
        weight_RS = tl.exp2(lse_RS - safe_R[:, None])
        out_RD = out_RD * shrink_R[:, None] + tl.sum(out_RSD * weight_RS[:, :, None], 1)
        sum_R = sum_R * shrink_R + tl.sum(weight_RS, 1)
        top_R = new_R
    has_keys_R = sum_R > 0.0
    sum_R = tl.where(has_keys_R, sum_R, 1.0)
    lse_R = tl.where(has_keys_R, (top_R + tl.log2(sum_R)) / _LOG2_E, float("-inf"))
    return out_RD / sum_R[:, None], lse_R


def launch_options(
    block_m: int, head_size: int, dtype: torch.dtype, *, fp8: bool = False
) -> dict[str, Any]:
    """Return the keys of a step, and how Triton runs the kernel.

    Args:
        block_m: query rows of a tile.
        head_size: of keys and values.
        dtype: of the queries.
        fp8: True if contexts are in e4m3.
    """
    fp8 = fp8 and head_size == _PAIRED.value
    options = dict(
        BLOCK_N=64 if head_size <= 128 else 32,
        num_warps=8 if block_m > 64 else 4,
        num_stages=3 if dtype.itemsize == 2 else 2,
    )
    if dtype.itemsize == 2 and head_size <= 128:
        # As measured on an H200. Large tiles gain by a second program on each multiprocessor, small
        # ones, which wait for keys, by more of them on the way.
        if block_m > 64:
            options |= dict(num_warps=4) if fp8 else dict(num_stages=2, maxnreg=128)
        elif block_m == 16:
            options |= dict(BLOCK_N=128) if fp8 else dict(num_stages=4)
    return options
