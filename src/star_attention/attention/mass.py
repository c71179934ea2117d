"""Attention mass: how much attention each key gets from some queries.

Axes: Q queries, K keys, H query heads, G KV heads, M query rows of a KV head, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.attend import Rule

_MAX_SCORES = 2**26
"""Scores in memory at once."""


def attention_mass(
    q_1QHD: Tensor, k_1KGD: Tensor, lse_1QH: Tensor, *, rule: Rule, offset: int
) -> Tensor:
    """Return the sum of the probabilities with which queries attend to each key, fp32 `[K]`.

    Args:
        q_1QHD: consecutive queries, of which all keys are before.
        k_1KGD: keys.
        lse_1QH: the lse of the queries over all keys that they see, here and elsewhere.
        rule: scale, window and softcap.
        offset: position of query 0 relative to key 0, in tokens.
    """
    Q, H = q_1QHD.shape[1:3]
    K, G = k_1KGD.shape[1:3]
    # Scaled before: there are far more scores than queries, and each pass over them takes its time.
    q_GMD = _by_kv_head(q_1QHD[0] * rule.scale, G)
    lse_GM1 = _by_kv_head(lse_1QH[0, :, :, None], G)
    mass_K = torch.zeros(K, dtype=torch.float32, device=q_1QHD.device)
    first = 0 if rule.window is None else max(0, offset - rule.window + 1)
    step = max(1, _MAX_SCORES // (Q * H))
    for start in range(first, K, step):
        part = slice(start, min(start + step, K))
        scores_GMN = _products(q_GMD, k_1KGD[0, part].permute(1, 2, 0))
        if rule.softcap is not None:
            scores_GMN = scores_GMN.div_(rule.softcap).tanh_().mul_(rule.softcap)
        weights_GMN = scores_GMN.sub_(lse_GM1).exp_()
        if rule.window is not None:
            at_N = torch.arange(part.start, part.stop, device=q_1QHD.device)
            back_QN = offset + torch.arange(Q, device=q_1QHD.device)[:, None] - at_N
            by_query_GRQN = weights_GMN.view(G, -1, Q, len(at_N))
            by_query_GRQN.masked_fill_(back_QN >= rule.window, 0.0)
        mass_K[part] = weights_GMN.sum((0, 1))
    return mass_K


def _by_kv_head(x_QHD: Tensor, kv_heads: int) -> Tensor:
    """Order query rows by KV head, `[G, M, D]`: its keys are read once for all of its heads."""
    Q, H, D = x_QHD.shape
    return x_QHD.view(Q, kv_heads, H // kv_heads, D).permute(1, 2, 0, 3).reshape(kv_heads, -1, D)


def _products(q_GMD: Tensor, k_GDN: Tensor) -> Tensor:
    """Return the products of queries and keys in fp32."""
    if q_GMD.is_cuda and q_GMD.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(q_GMD, k_GDN, out_dtype=torch.float32)
    return torch.bmm(q_GMD.float(), k_GDN.float())
