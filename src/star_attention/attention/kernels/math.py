"""Attention by plain matrix products, on any device, in any dtype, with softcap and explicit masks.

It computes in fp32, in pieces that bound the working memory.

Axes: B batch, Q queries, K keys, H query heads, G KV heads, R query heads of a KV head, M rows
(R x Q), D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.kernels import Call
from star_attention.attention.state import State, merge

MAX_SCORES = 2**24
"""Scores in memory at once (64 MiB in fp32)."""
MAX_KEYS = 2**15
"""Keys converted to fp32 at once."""


def unsupported(call: Call) -> list[str]:
    return [] if call.window is None else ["takes windows as masks only"]


def attend(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    *,
    call: Call,
    scale: float,
    mask_BQK: Tensor | None,
) -> State:
    batch, queries, heads, _ = q_BQHD.shape
    keys = k_BKGD.shape[1]
    assert not call.causal or queries <= keys, "every causal row sees a key"
    rows = max(1, MAX_SCORES // (batch * heads * min(keys, MAX_KEYS)))
    parts = []
    for row in range(0, queries, rows):
        stop = min(row + rows, queries)
        # Keys that the last of these rows sees.
        visible = min(keys, keys - queries + stop) if call.causal else keys
        states = []
        for key in range(0, visible, MAX_KEYS):
            key_stop = min(key + MAX_KEYS, visible)
            mask = None if mask_BQK is None else mask_BQK[:, row:stop, key:key_stop]
            if call.causal:
                limit_Q = torch.arange(row, stop, device=q_BQHD.device) + (keys - queries)
                mask = (torch.arange(key, key_stop, device=q_BQHD.device) <= limit_Q[:, None])[None]
            states.append(
                _attend(
                    q_BQHD[:, row:stop],
                    k_BKGD[:, key:key_stop],
                    v_BKGD[:, key:key_stop],
                    scale,
                    mask,
                    call.softcap,
                )
            )
        parts.append(merge(states))
    if len(parts) == 1:
        return parts[0]
    return State(
        torch.cat([p.out_BQHD for p in parts], 1), torch.cat([p.lse_BQH for p in parts], 1)
    )


def _attend(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    scale: float,
    mask_BQK: Tensor | None,
    softcap: float | None,
) -> State:
    B, Q, H, D = q_BQHD.shape
    G = k_BKGD.shape[2]
    # Query heads of one KV head become rows: keys are read once and not repeated in memory.
    q_BGMD = (
        q_BQHD.reshape(B, Q, G, H // G, D)
        .permute(0, 2, 3, 1, 4)
        .reshape(B, G, (H // G) * Q, D)
        .float()
    )
    k_BGDK = k_BKGD.permute(0, 2, 3, 1).float()
    v_BGKD = v_BKGD.permute(0, 2, 1, 3).float()
    scores_BGMK = torch.matmul(q_BGMD, k_BGDK).mul_(scale)
    if softcap is not None:
        scores_BGMK = scores_BGMK.div_(softcap).tanh_().mul_(softcap)
    if mask_BQK is not None:
        scores_BGRQK = scores_BGMK.view(B, G, H // G, Q, -1)
        scores_BGRQK.masked_fill_(~mask_BQK[:, None, None], float("-inf"))
    lse_BGM = torch.logsumexp(scores_BGMK, dim=-1)
    # A row without keys has lse -inf. Subtracting 0 instead leaves exp(-inf) = 0 in the whole row.
    weights_BGMK = scores_BGMK.sub_(lse_BGM.nan_to_num(neginf=0.0)[..., None]).exp_()
    out_BGMD = torch.matmul(weights_BGMK, v_BGKD)
    out_BQHD = out_BGMD.view(B, G, H // G, Q, -1).permute(0, 3, 1, 2, 4).reshape(B, Q, H, -1)
    lse_BQH = lse_BGM.view(B, G, H // G, Q).permute(0, 3, 1, 2).reshape(B, Q, H)
    return State(out_BQHD, lse_BQH)
