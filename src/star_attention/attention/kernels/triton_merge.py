"""Merging of two attention states in one pass over memory, in Triton.

Axes: B batch, Q query rows, H query heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


@triton.jit
def _merge(
    a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, out_ptr, lse_ptr,
    a_b, a_q, a_h, al_b, al_q, al_h,
    b_b, b_q, b_h, bl_b, bl_q, bl_h,
    total, queries, first,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < total
    h = at % HEADS
    q = at // HEADS % queries
    b = at // HEADS // queries
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    later = inside & (q >= first)
    a_lse = tl.load(a_lse_ptr + b * al_b + q * al_q + h * al_h, mask=inside, other=float("-inf"))
    b_lse = tl.load(
        b_lse_ptr + b * bl_b + (q - first) * bl_q + h * bl_h, mask=later, other=float("-inf")
    )
    top = tl.maximum(a_lse, b_lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    a_weight = tl.exp(a_lse - safe)
    b_weight = tl.exp(b_lse - safe)
    weights = a_weight + b_weight
    divisor = tl.where(weights > 0.0, weights, 1.0)
    a_out = tl.load(
        a_ptr + (b * a_b + q * a_q + h * a_h)[:, None] + d[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    b_mask = mask & later[:, None]
    b_out = tl.load(
        b_ptr + (b * b_b + (q - first) * b_q + h * b_h)[:, None] + d[None, :],
        mask=b_mask,
        other=0.0,
    ).to(tl.float32)
    out = a_out * (a_weight / divisor)[:, None] + b_out * (b_weight / divisor)[:, None]
    tl.store(out_ptr + at[:, None] * D + d[None, :], out, mask=mask)
    tl.store(
        lse_ptr + at,
        safe + tl.log(divisor) + tl.where(weights > 0.0, 0.0, float("-inf")),
        mask=inside,
    )


def merge(
    a_out_BQHD: Tensor,
    a_lse_BQH: Tensor,
    b_out_BQHD: Tensor,
    b_lse_BQH: Tensor,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Merge two states over disjoint sets of keys.

    Args:
        a_out_BQHD: output of the first state.
        a_lse_BQH: its lse.
        b_out_BQHD: output of the second state, which may cover the last query rows only.
        b_lse_BQH: its lse.
        dtype: precision of the merged output.

    Returns:
        Output and lse over the union of the keys.
    """
    B, Q, H, D = a_out_BQHD.shape
    assert a_out_BQHD.stride(3) == b_out_BQHD.stride(3) == 1
    out_BQHD = torch.empty(B, Q, H, D, dtype=dtype, device=a_out_BQHD.device)
    lse_BQH = torch.empty(B, Q, H, dtype=torch.float32, device=a_out_BQHD.device)
    total = B * Q * H
    _merge[(triton.cdiv(total, _ROWS),)](
        a_out_BQHD, a_lse_BQH, b_out_BQHD, b_lse_BQH, out_BQHD, lse_BQH,
        *a_out_BQHD.stride()[:3], *a_lse_BQH.stride(),
        *b_out_BQHD.stride()[:3], *b_lse_BQH.stride(),
        total, Q, Q - b_out_BQHD.shape[1],
        HEADS=H, D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=_ROWS,
        num_warps=4,
    )  # fmt: skip
    return out_BQHD, lse_BQH
