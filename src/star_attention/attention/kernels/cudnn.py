"""cuDNN's fused attention, the fastest on Hopper for the large calls of phase 1."""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.kernels import Call, half_precision_cuda
from star_attention.attention.state import State

MIN_QUERIES = 256
"""Fewest queries. Below, FlashAttention-2 splits the keys over the device and is faster."""


def unsupported(call: Call) -> list[str]:
    reasons = half_precision_cuda(call, head_size_limit=128)
    if call.device != "cuda":
        return reasons
    if not (torch.cuda.is_available() and torch.backends.cudnn.is_available()):
        reasons.append("cuDNN is not available")
    elif torch.cuda.get_device_capability()[0] < 9:
        reasons.append("is measured on Hopper and later only")
    if call.window is not None:
        reasons.append("takes no window")
    if call.causal and not call.square:
        reasons.append("causal needs as many queries as keys")
    if call.queries < MIN_QUERIES or call.keys < 2:
        reasons.append(f"is for {MIN_QUERIES} queries or more")
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
    assert mask_BQK is None, "this kernel takes no mask"
    out_BHQD, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BQHD.transpose(1, 2),
        k_BKGD.transpose(1, 2),
        v_BKGD.transpose(1, 2),
        None,
        True,
        0.0,
        call.causal,
        False,
        scale=scale,
    )[:2]
    lse_BHQ = lse.reshape(q_BQHD.shape[0], call.heads, call.queries)
    return State(out_BHQD.transpose(1, 2), lse_BHQ.transpose(1, 2).float())
