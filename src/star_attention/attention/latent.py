"""Attention of few queries in the compressed space of MLA: the context is never expanded.

A head's key is `[W_k c, r]` and its value `W_v c`, where all heads share the compressed `c` and the
rotary part `r`. So the query `[q, p]` has the score `(q W_k) c + p r`, and the mean of the values
is `W_v` times the mean of the `c` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2 and appendix C).
Each `c` is read once for all heads, as the key and the value of one head of attention.

Axes: B batch, Q queries, K keys, P keys of a piece, T tail tokens, H query heads, G heads of what
is stored (1), M rows (Q x H), D head size of expanded keys, N their part without rotation, V head
size of expanded values, X elements that are expanded (N + V), C compressed size, R rotary size, E
elements of an absorbed query (C + R).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.blocks import KV, shard_attention, tail_attention
from star_attention.attention.state import State, merge

_MAX_SCORES = 2**24
"""Scores in memory at once (64 MiB in fp32)."""
_MAX_KEYS = 2**12
"""Keys of one piece, so that a CPU's cache still holds them when they are read as values."""


@dataclass(frozen=True)
class Expansion:
    """The weights that make keys and values of compressed ones.

    Attributes:
        weight_HXC: for each head `W_k`, `[N, C]`, followed by `W_v`, `[V, C]`.
        plain_size: N, the elements of a key that have no rotation.
    """

    weight_HXC: Tensor
    plain_size: int

    def absorb(self, q_BQHD: Tensor) -> Tensor:
        """Return queries for compressed keys, `[B, Q, H, E]`."""
        plain_BQHN, rotary_BQHR = q_BQHD.tensor_split([self.plain_size], -1)
        weight_HNC = self.weight_HXC[:, : self.plain_size]
        plain_BQHC = torch.einsum("bqhn,hnc->bqhc", plain_BQHN, weight_HNC)
        return torch.cat([plain_BQHC, rotary_BQHR], -1)

    def expand(self, state: State, dtype: torch.dtype | None) -> State:
        """Return the state over values, of one over compressed ones.

        Args:
            state: the merged state.
            dtype: precision of the result's `out`, fp32 by default.
        """
        weight_HVC = self.weight_HXC[:, self.plain_size :]
        mean_BQHC = state.out_BQHD.to(weight_HVC.dtype)
        out_BQHV = torch.einsum("bqhc,hvc->bqhv", mean_BQHC, weight_HVC)
        out_BQHV = out_BQHV.to(dtype or torch.float32).contiguous()
        return State(out_BQHV, state.lse_BQH)


def compressed_shard_attention(
    q_BQHE: Tensor, shard: KV, *, rule: Rule, offsets: list[int]
) -> State:
    """Compute attention of all query rows over compressed keys of one context.

    Args:
        q_BQHE: absorbed queries.
        shard: compressed keys, which are the values, too, and rotary parts of the keys:
            `c_1KGC, r_1KGR` of one head.
        rule: scale, window and softcap.
        offsets: tokens from the first key to the first query of each batch row.

    Returns:
        The state over compressed values.
    """
    B, Q, H, E = q_BQHE.shape
    sees_all = min(offsets) >= shard[0].shape[1] - 1
    if sees_all and rule.window is None and rule.softcap is None:
        state = _over_all(q_BQHE.reshape(1, B * Q, H, E), *shard, rule.scale)
        return State(state.out_BQHD.view(B, Q, H, -1), state.lse_BQH.view(B, Q, H))
    return shard_attention(q_BQHE, as_one_head(*shard), rule=rule, offsets=offsets)


def compressed_tail_attention(
    q_BQHE: Tensor, c_BTGC: Tensor, r_BTGR: Tensor, *, rule: Rule, padding: list[int]
) -> State:
    """Compute attention of query rows over the compressed tail, whose last Q keys are their own.

    Arguments and result as of `compressed_shard_attention`, but for `padding`: first tail tokens of
    each batch row that are padding, which nobody sees.
    """
    sees_all = q_BQHE.shape[1] == 1 and not any(padding)
    if sees_all and rule.window is None and rule.softcap is None:
        return _over_all(q_BQHE, c_BTGC, r_BTGR, rule.scale)
    return tail_attention(q_BQHE, *as_one_head(c_BTGC, r_BTGR), rule=rule, padding=padding)


def as_one_head(c_BKGC: Tensor, r_BKGR: Tensor) -> KV:
    """Return what is stored as keys and values of one head, `k_BKGE, v_BKGC`."""
    return torch.cat([c_BKGC, r_BKGR], -1), c_BKGC


def _over_all(q_BQHE: Tensor, c_BKGC: Tensor, r_BKGR: Tensor, scale: float) -> State:
    """Compute attention of queries that see every key."""
    B, Q, H, _ = q_BQHE.shape
    c_BKC, r_BKR = c_BKGC[:, :, 0], r_BKGR[:, :, 0]
    K, C = c_BKC.shape[1:]
    # Scaled before: there are far more scores than queries.
    q_BMC, q_BMR = (q_BQHE.flatten(1, 2) * scale).tensor_split([C], -1)
    step = max(1, min(_MAX_KEYS, _MAX_SCORES // (B * Q * H)))
    states = []
    for start in range(0, K, step):
        c_BPC = _in_products(c_BKC[:, start : start + step])
        r_BPR = _in_products(r_BKR[:, start : start + step])
        scores_BMP = _product(q_BMC, c_BPC.mT) + _product(q_BMR, r_BPR.mT)
        lse_BM = scores_BMP.logsumexp(-1)
        weights_BMP = scores_BMP.sub_(lse_BM[..., None]).exp_()
        out_BMC = _product(weights_BMP, c_BPC)
        states.append(State(out_BMC.view(B, Q, H, C), lse_BM.view(B, Q, H)))
    return merge(states)


def _in_products(x: Tensor) -> Tensor:
    """Return keys as `_product` multiplies them: half precision on CUDA, fp32 elsewhere."""
    return x if x.is_cuda else x.float()


def _product(a_BMX: Tensor, b_BXY: Tensor) -> Tensor:
    """Return a product in fp32."""
    if b_BXY.is_cuda and b_BXY.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a_BMX.to(b_BXY.dtype), b_BXY, out_dtype=torch.float32)
    return torch.bmm(a_BMX.float(), b_BXY.float())
