"""Phase 2's attention with lengths and addresses read on the device; ours, in Triton.

torch's kernels take both from the host, so that a CUDA graph around them serves one context at one step. Here a `table`
says where each layer's keys and values lie and `lengths` how many there are: one graph serves every context and every step.

Keys are cut into runs (flash decoding, Dao et al. 2023): `splits` over the context, which all rows share and whose keys are
read once for all of them, and `TAIL_SPLITS` over each row's tail. A second kernel merges the runs.

Axes: R batch rows, Q new tokens of each, H query heads, G KV heads, M query rows of one KV head, D head size, N keys at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.state import State

TAIL_SPLITS = 4
SPLITS = 32
_BLOCK_N = 64

COLUMNS = 6
"""Of the table: addresses of the context's keys and values, `[G, tokens, D]`, of the tail's, `[R, G, capacity, D]`, and of the fp32
scales of a context in fp8, `[G, tokens]`."""
LENGTHS = 3
"""Tokens of the context, tokens of the tail before the new ones, and how many the tail has room for."""

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _append(
    k_ptr, v_ptr, table_ptr, lengths_ptr,
    k_r, k_g, k_q, v_r, v_g, v_q,
    layer, queries,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = k_ptr.dtype.element_ty
    at = tl.program_id(0)
    q = at % queries
    g = at // queries % KV_HEADS
    r = at // queries // KV_HEADS
    d = tl.arange(0, BLOCK_D)
    there = d < D
    slot = tl.load(lengths_ptr + 1) + q
    to = ((r * KV_HEADS + g) * tl.load(lengths_ptr + 2) + slot) * D + d
    k_D = tl.load(k_ptr + r * k_r + g * k_g + q * k_q + d, mask=there)
    v_D = tl.load(v_ptr + r * v_r + g * v_g + q * v_q + d, mask=there)
    tl.store(
        tl.load(table_ptr + layer * COLUMNS + 2).to(tl.pointer_type(kind)) + to, k_D, mask=there
    )
    tl.store(
        tl.load(table_ptr + layer * COLUMNS + 3).to(tl.pointer_type(kind)) + to, v_D, mask=there
    )


@triton.jit
def _runs(
    q_ptr, table_ptr, lengths_ptr, padding_ptr, out_ptr, lse_ptr,
    layer, scale, softcap, window,
    rows, queries, tiles, tail_tiles, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TAIL_SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kind: tl.constexpr = q_ptr.dtype.element_ty
    g = tl.program_id(0)
    part = tl.program_id(1)
    tokens = tl.load(lengths_ptr)
    before = tl.load(lengths_ptr + 1)
    capacity = tl.load(lengths_ptr + 2)

    # Which run this is. Programs of the context come first: all rows together; then those of each row's tail.
    of_tail = part >= splits * tiles
    after = part - splits * tiles
    pieces = tl.where(of_tail, TAIL_SPLITS, splits)
    number = tl.where(of_tail, after % TAIL_SPLITS, part % splits)
    tile = tl.where(of_tail, after // TAIL_SPLITS % tail_tiles, part // splits)
    tail_row = tl.where(of_tail, after // TAIL_SPLITS // tail_tiles, 0)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (row, query, head of the group)
    row = tail_row + m // (queries * GROUP)
    query = m // GROUP % queries
    held = m < tl.where(of_tail, 1, rows) * queries * GROUP
    at_M = ((row * queries + query) * HEADS + g * GROUP + m % GROUP).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    there = d < D
    q_MD = tl.load(
        q_ptr + at_M[:, None] * D + d[None, :], mask=held[:, None] & there[None, :], other=0.0
    )

    # The keys that each row sees: from `first` on, before `last`.
    padding = tl.load(padding_ptr + row, mask=held, other=0)
    last = tl.where(of_tail, (before + query + 1).to(tl.int32), tokens.to(tl.int32))
    first = tl.where(of_tail, padding, 0)
    if WINDOW:
        own = tl.where(of_tail, before + query, tokens + before + query - padding)
        first = tl.maximum(first, (own - window + 1).to(tl.int32))
    length = tl.where(of_tail, before + queries, tokens)
    base = tl.where(of_tail, (tail_row * KV_HEADS + g) * capacity, g * tokens) * D
    column = layer * COLUMNS + tl.where(of_tail, 2, 0)
    # (What is read on the device says nothing of its alignment by itself, and unaligned loads are slow.)
    base = tl.multiple_of(base, 16)
    k_at = tl.multiple_of(tl.load(table_ptr + column), 16)
    v_at = tl.multiple_of(tl.load(table_ptr + column + 1), 16)
    k_ptr = tl.multiple_of(k_at.to(tl.pointer_type(kind)) + base, 16)
    v_ptr = tl.multiple_of(v_at.to(tl.pointer_type(kind)) + base, 16)

    if FP8:
        k8_ptr = tl.multiple_of(k_at.to(tl.pointer_type(tl.float8e4nv)) + base, 16)
        v8_ptr = tl.multiple_of(v_at.to(tl.pointer_type(tl.float8e4nv)) + base, 16)
        scales = tl.where(of_tail, 0, g * tokens)
        k_scale_ptr = (
            tl.load(table_ptr + layer * COLUMNS + 4).to(tl.pointer_type(tl.float32)) + scales
        )
        v_scale_ptr = (
            tl.load(table_ptr + layer * COLUMNS + 5).to(tl.pointer_type(tl.float32)) + scales
        )

    each = tl.cdiv(tl.cdiv(length, pieces), BLOCK_N) * BLOCK_N
    start = number * each
    stop = tl.minimum(start + each, length)
    if WINDOW:
        lowest = tl.min(tl.where(held, first, 2147483647))
        start = tl.maximum(start, lowest // BLOCK_N * BLOCK_N)

    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    out_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in tl.range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        inside = (n < stop)[:, None] & there[None, :]
        place_ND = n.to(tl.int64)[:, None] * D + d[None, :]
        if FP8:  # (one of two loads has nothing to do then: the tail is in the queries' precision)
            stored = n < tl.where(of_tail, 0, stop)
            near = (n < tl.where(of_tail, stop, 0))[:, None] & there[None, :]
            far = stored[:, None] & there[None, :]
        k_ND = tl.load(k_ptr + place_ND, mask=near if FP8 else inside, other=0.0)
        if FP8:
            k_ND = tl.where(of_tail, k_ND, tl.load(k8_ptr + place_ND, mask=far).to(kind))
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale
        if FP8:
            scores_MN = scores_MN * tl.load(k_scale_ptr + n, mask=stored, other=1.0)[None, :]
        if SOFTCAP:
            scores_MN = softcap * (2.0 * tl.sigmoid(2.0 * scores_MN / softcap) - 1.0)
        seen = (n < stop)[None, :] & (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        scores_MN = tl.where(seen, scores_MN * _LOG2_E, float("-inf"))
        new_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        shrink_M = tl.exp2(top_M - safe_M)
        weight_MN = tl.exp2(scores_MN - safe_M[:, None])
        v_ND = tl.load(v_ptr + place_ND, mask=near if FP8 else inside, other=0.0)
        if FP8:
            v8_ND = tl.load(v8_ptr + place_ND, mask=far).to(tl.float32)
            v_scale_N = tl.load(v_scale_ptr + n, mask=stored, other=0.0)
            v_ND = tl.where(of_tail, v_ND, tl.where(far, v8_ND * v_scale_N[:, None], 0.0).to(kind))
        out_MD = tl.dot(
            weight_MN.to(kind), v_ND, acc=out_MD * shrink_M[:, None], input_precision=PRECISION
        )
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
        top_M = new_M

    run = tl.where(of_tail, splits + number, number)
    place_M = at_M * (splits + TAIL_SPLITS) + run
    some_M = sum_M > 0.0
    sum_M = tl.where(some_M, sum_M, 1.0)
    tl.store(
        out_ptr + place_M[:, None] * D + d[None, :],
        out_MD / sum_M[:, None],
        mask=held[:, None] & there[None, :],
    )
    tl.store(lse_ptr + place_M, tl.where(some_M, top_M + tl.log2(sum_M), float("-inf")), mask=held)


@triton.jit
def _merged(
    out_ptr, lse_ptr, result_ptr, result_lse_ptr, runs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    there = d < D
    lse_S = tl.load(lse_ptr + at * runs + s, mask=s < runs, other=float("-inf"))
    top = tl.max(lse_S)  # (a query sees at least itself)
    weight_S = tl.exp2(lse_S - top)
    weights = tl.sum(weight_S)
    inside = (s < runs)[:, None] & there[None, :]
    out_SD = tl.load(out_ptr + (at * runs + s)[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(result_ptr + at * D + d, tl.sum(out_SD * weight_S[:, None], 0) / weights, mask=there)
    tl.store(result_lse_ptr + at, (top + tl.log2(weights)) / _LOG2_E)


def addresses(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """The table, on the CPU, of what each layer holds, in the order of its columns; zeros for what there is none of."""
    rows = [[tensor.data_ptr() for tensor in held] for held in layers]
    return torch.tensor([row + [0] * (COLUMNS - len(row)) for row in rows])


def append(k_RGQD: Tensor, v_RGQD: Tensor, *, table: Tensor, lengths: Tensor, layer: int) -> None:
    """Write new keys and values behind each row's tail, which has room for them."""
    R, G, Q, D = k_RGQD.shape
    k_RGQD, v_RGQD = (t if t.stride(3) == 1 else t.contiguous() for t in (k_RGQD, v_RGQD))
    _append[(R * G * Q,)](
        k_RGQD, v_RGQD, table, lengths, *k_RGQD.stride()[:3], *v_RGQD.stride()[:3], layer, Q,
        KV_HEADS=G, D=D, BLOCK_D=triton.next_power_of_2(D), COLUMNS=COLUMNS,
        num_warps=1,
    )  # fmt: skip


def attend(
    q_RQHD: Tensor,
    kv_heads: int,
    *,
    table: Tensor,
    lengths: Tensor,
    padding_R: Tensor,
    layer: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    splits: int | None = None,
) -> State:
    """Attention of Q new tokens a row over the context and the row's tail, themselves included (`append` comes first).

    table: int64 `[layers, COLUMNS]`; lengths: int64 `[LENGTHS]`. fp8: the context is in e4m3 with scales; else it is in the
    queries' precision, as the tail always is. padding_R: int32, void entries at the head of each row's tail; the result of a
    query among them means nothing. dtype: of the result.
    """
    R, Q, H, D = q_RQHD.shape
    q_RQHD = q_RQHD.contiguous()
    row = Q * H // kv_heads
    block_m = min(64, max(16, triton.next_power_of_2(R * row)))
    tiles, tail_tiles = triton.cdiv(R * row, block_m), triton.cdiv(row, block_m)
    splits = splits or SPLITS
    if tiles > 1:  # programs enough without: each more makes partial results to merge
        splits = max(min(4, splits), splits // tiles)
    runs = splits + TAIL_SPLITS
    block_d = max(16, triton.next_power_of_2(D))
    out, lse = (
        torch.empty(shape, dtype=torch.float32, device=q_RQHD.device)
        for shape in ((R, Q, H, runs, D), (R, Q, H, runs))
    )
    _runs[(kv_heads, splits * tiles + R * tail_tiles * TAIL_SPLITS)](
        q_RQHD, table, lengths, padding_R, out, lse,
        layer, scale, softcap or 0.0, window or 0,
        R, Q, tiles, tail_tiles, splits,
        HEADS=H, KV_HEADS=kv_heads, D=D, TAIL_SPLITS=TAIL_SPLITS, COLUMNS=COLUMNS,
        BLOCK_M=block_m, BLOCK_N=_BLOCK_N if block_d <= 128 else _BLOCK_N // 2, BLOCK_D=block_d,
        SOFTCAP=softcap is not None, WINDOW=window is not None,
        PRECISION="ieee" if q_RQHD.dtype == torch.float32 else "tf32", FP8=fp8,
        num_warps=4, num_stages=3 if q_RQHD.element_size() == 2 else 2,
    )  # fmt: skip
    out_RQHD = torch.empty(R, Q, H, D, dtype=dtype, device=q_RQHD.device)
    lse_RQH = torch.empty(R, Q, H, dtype=torch.float32, device=q_RQHD.device)
    _merged[(R * Q * H,)](
        out, lse, out_RQHD, lse_RQH, runs, D=D, BLOCK_D=block_d, BLOCK_S=triton.next_power_of_2(runs), num_warps=4
    )  # fmt: skip
    return State(out_RQHD, lse_RQH)
