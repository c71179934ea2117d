"""torch's memory-efficient CUDA kernel: float32, and head sizes beyond the other kernels'."""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.kernels import Call
from star_attention.attention.state import State


def unsupported(call: Call) -> list[str]:
    reasons = []
    if call.device != "cuda":
        reasons.append(f"runs on cuda, not {call.device}")
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"takes float32, float16 and bfloat16, not {call.dtype}")
    if call.masked:
        reasons.append("is used without masks only")
    if call.softcap is not None:
        reasons.append("has no softcap")
    if call.window is not None:
        reasons.append("takes no window")
    if call.causal and not call.square:
        reasons.append("causal needs as many queries as keys")
    if call.head_size % 8:
        reasons.append(f"takes head sizes in steps of 8, not {call.head_size}")
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
    assert mask_BQK is None, "this kernel is used without a mask"
    groups = call.heads // call.kv_heads
    # The kernel has no grouped queries of its own: keys are repeated for each group.
    k_BKHD = k_BKGD if groups == 1 else k_BKGD.repeat_interleave(groups, dim=2)
    v_BKHD = v_BKGD if groups == 1 else v_BKGD.repeat_interleave(groups, dim=2)
    out_BHQD, lse_BHQ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_BQHD.transpose(1, 2),
        k_BKHD.transpose(1, 2),
        v_BKHD.transpose(1, 2),
        None,
        True,
        0.0,
        call.causal,
        scale=scale,
    )[:2]
    # The lse is padded to a multiple of 32 rows.
    return State(out_BHQD.transpose(1, 2), lse_BHQ[:, :, : call.queries].transpose(1, 2).float())
