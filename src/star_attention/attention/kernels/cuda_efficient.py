"""torch's memory-efficient CUDA kernel: float32, and head sizes that the half-precision kernels do not take."""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.kernels import Call
from star_attention.attention.state import State


def unsupported(call: Call) -> list[str]:
    why = []
    if call.device != "cuda":
        why.append(f"runs on cuda, not {call.device}")
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        why.append(f"takes float32, float16 and bfloat16, not {call.dtype}")
    if call.masked:
        why.append("is used without masks only")
    if call.softcap is not None:
        why.append("has no softcap")
    if call.window is not None:
        why.append("takes no window")
    if call.causal and not call.square:
        why.append("causal needs as many queries as keys")
    if call.head_size % 8:
        why.append(f"takes head sizes in steps of 8, not {call.head_size}")
    return why


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
    # No native GQA: expanding copies nothing, the reshape below does when there are groups.
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
    # The lse comes padded to a multiple of 32 rows.
    return State(out_BHQD.transpose(1, 2), lse_BHQ[:, :, : call.queries].transpose(1, 2).float())
