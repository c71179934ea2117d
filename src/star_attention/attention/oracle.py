"""The law of Star Attention as one boolean mask: slow, and what every fast path is compared with.

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
    lookback: int = 0,
) -> Tensor:
    """Return which keys each query sees, bool `[Q, K]`.

    With i the position of the query and j that of the key:

        j <= i and (window is None or i - j < window)
        and (i >= context_tokens or j < anchor_size or 0 <= block(i) - block(j) <= lookback)

    Args:
        query_positions_Q: positions of the queries.
        key_positions_K: positions of the keys.
        context_tokens: tokens of the context; later ones are query or generated tokens.
        block_size: tokens of a block.
        anchor_size: tokens of the anchor.
        window: sliding window of the layer in tokens, None for full attention.
        lookback: blocks before its own that a block sees in this layer.
    """
    i_Q1, j_1K = query_positions_Q[:, None], key_positions_K[None, :]
    blocks_back = (i_Q1 // block_size) - (j_1K // block_size)
    is_near = (blocks_back >= 0) & (blocks_back <= lookback) & (j_1K < context_tokens)
    keep_QK = (j_1K <= i_Q1) & ((i_Q1 >= context_tokens) | is_near | (j_1K < anchor_size))
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
    """Compute attention under an explicit mask, with every score in memory.

    Args:
        q_BQHD: queries.
        k_BKGD: keys.
        v_BKGD: values.
        keep_QK: True where a query sees a key, `[Q, K]` or `[B, Q, K]`.
        scale: factor of the scores.
        softcap: softcap of the scores, None for none.
        dtype: precision of every step.

    Returns:
        The state over the visible keys; the empty state in rows that see none.
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
