"""The law, slow on purpose: one boolean mask defines the method, and this file is how every fast path is checked.

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.state import State


def law_mask(
    query_positions_Q: Tensor,
    key_positions_K: Tensor,
    *,
    context_tokens: int,
    block_size: int,
    anchor_size: int,
    window: int | None = None,
) -> Tensor:
    """Which keys each query sees, `[Q, K]` bool:

    `j <= i and (window is None or i - j < window) and (i is no context token or block(i) == block(j) or j < anchor)`.
    """
    i_Q1, j_1K = query_positions_Q[:, None], key_positions_K[None, :]
    same_block = (i_Q1 // block_size) == (j_1K // block_size)
    keep_QK = (j_1K <= i_Q1) & (
        (i_Q1 >= context_tokens) | (same_block & (j_1K < context_tokens)) | (j_1K < anchor_size)
    )
    return keep_QK if window is None else keep_QK & (i_Q1 - j_1K < window)


def masked_attention(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    keep_QK: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> State:
    """Attention under an explicit mask, every score written out, in `dtype`; rows without keys give the empty state.

    `keep_QK` may have a leading batch axis.
    """
    groups = q_BQHD.shape[2] // k_BKGD.shape[2]
    k_BKHD = k_BKGD.repeat_interleave(groups, dim=2).to(dtype)
    v_BKHD = v_BKGD.repeat_interleave(groups, dim=2).to(dtype)
    scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", q_BQHD.to(dtype), k_BKHD) * scale
    if softcap is not None:
        scores_BHQK = softcap * torch.tanh(scores_BHQK / softcap)
    keep = keep_QK[:, None] if keep_QK.dim() == 3 else keep_QK
    scores_BHQK = scores_BHQK.masked_fill(~keep, float("-inf"))
    lse_BHQ = torch.logsumexp(scores_BHQK, dim=-1)
    weights_BHQK = torch.exp(scores_BHQK - lse_BHQ.nan_to_num(neginf=0.0)[..., None])
    out_BQHD = torch.einsum("bhqk,bkhd->bqhd", weights_BHQK, v_BKHD)
    return State(out_BQHD, lse_BHQ.transpose(1, 2).float())
