"""torch's FlashAttention: half precision, causal masks aligned bottom-right, native windows.

It is version 2, unless the user has activated version 3 or 4 in torch: they replace the operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.kernels import Call, half_precision_cuda
from star_attention.attention.state import State


def unsupported(call: Call) -> list[str]:
    return half_precision_cuda(call, head_size_limit=256)


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
    window = (
        {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}
    )
    out_BQHD, lse_BHQ = torch.ops.aten._flash_attention_forward(
        q_BQHD,
        k_BKGD,
        v_BKGD,
        None,
        None,
        call.queries,
        call.keys,
        0.0,
        call.causal,
        False,
        scale=scale,
        **window,
    )[:2]
    return State(out_BQHD, lse_BHQ.transpose(1, 2).float())
