"""torch's blocked CPU kernel of `scaled_dot_product_attention`, called directly to get the lse."""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.kernels import Call
from star_attention.attention.state import State

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(call: Call) -> list[str]:
    reasons = []
    if call.device != "cpu":
        reasons.append(f"runs on cpu, not {call.device}")
    if call.dtype not in _DTYPES:
        reasons.append(f"takes float32, bfloat16 and float16, not {call.dtype}")
    if call.softcap is not None:
        reasons.append("has no softcap")
    if call.window is not None:
        reasons.append("takes windows as masks only")
    if call.causal and not call.square:
        # Its causal mask is aligned top-left. Only a square one is the same in both alignments.
        reasons.append("causal needs as many queries as keys")
    return reasons


def attend(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    *,
    call: Call,
    scale: float,
    mask_BQK: Tensor | None,
) -> State:
    bias_B1QK = None
    if mask_BQK is not None:
        bias_B1QK = mask_BQK.new_zeros(mask_BQK.shape, dtype=q_BQHD.dtype).masked_fill_(
            ~mask_BQK, float("-inf")
        )[:, None]
    out_BHQD, lse_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BQHD.transpose(1, 2),
        k_BKGD.transpose(1, 2),
        v_BKGD.transpose(1, 2),
        0.0,
        call.causal,
        attn_mask=bias_B1QK,
        scale=scale,
    )
    out_BQHD, lse_BQH = out_BHQD.transpose(1, 2), lse_BHQ.transpose(1, 2).float()
    if mask_BQK is not None:
        # The operation returns an lse of 0 for a row without keys.
        empty_BQ = ~mask_BQK.any(-1)
        lse_BQH = lse_BQH.masked_fill(empty_BQ[..., None], float("-inf"))
        out_BQHD = out_BQHD.masked_fill(empty_BQ[..., None, None], 0.0)
    return State(out_BQHD, lse_BQH)
