"""Attention of one forward of phase 1, and of phase 2 over a shard, made of `attend` and `merge`.

Axes: B batch, Q queries, K keys, A anchor tokens, T tail tokens, N blocks of a forward,
H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.state import State, merge, merge_last
from star_attention.planning.plan import BlockPlan, Span

KV = tuple[Tensor, Tensor]


def block_attention(
    q_BQHD: Tensor,
    own: KV,
    *,
    anchor: KV | None,
    earlier: KV | None,
    span: Span,
    plan: BlockPlan,
    rule: Rule,
) -> State:
    """Compute attention of context tokens over their blocks and the anchor (paper, section 2.1).

    Args:
        q_BQHD: queries of the span's tokens.
        own: keys and values of these tokens, `k_BQGD, v_BQGD`.
        anchor: keys and values of the anchor, `k_BAGD, v_BAGD`; None while its tokens are in the
            span, or if there are none.
        earlier: keys and values of the block's tokens before the span, None if there are none.
        span: the tokens: whole blocks, or a piece of one.
        plan: sizes of blocks and anchor.
        rule: scale, window and softcap.
    """
    B, Q, H, _ = q_BQHD.shape
    k_BQGD, v_BQGD = own
    block_size = plan.block_size
    if Q > block_size:
        # Blocks do not see each other: they make a batch of square causal calls.
        N = Q // block_size
        assert N * block_size == Q, "a forward holds whole blocks or a piece of one"
        q, k, v = (t.reshape(B * N, block_size, *t.shape[2:]) for t in (q_BQHD, k_BQGD, v_BQGD))
        folded = attend(q, k, v, rule=rule, offset=0)
        state = State(folded.out_BQHD.reshape(B, Q, H, -1), folded.lse_BQH.reshape(B, Q, H))
    else:
        state = attend(q_BQHD, k_BQGD, v_BQGD, rule=rule, offset=0)
    if earlier is not None:
        state = merge(
            [attend(q_BQHD, *earlier, rule=rule, offset=span.start - span.block_start), state]
        )
    # The first block contains the anchor. Every later one sees the whole anchor.
    first = max(0, block_size - span.start) if span.block_start == 0 else 0
    if plan.anchor_size == 0 or first >= Q:
        return state
    if anchor is None:
        assert span.start == 0, "later forwards need the anchor"
        anchor = (k_BQGD[:, : plan.anchor_size], v_BQGD[:, : plan.anchor_size])
    over_anchor = attend(q_BQHD[:, first:], *anchor, rule=rule, offset=span.start + first)
    return merge_last(state, over_anchor, dtype=rule.dtype)


def shard_attention(q_BQHD: Tensor, shard: KV, *, rule: Rule, offsets: list[int]) -> State:
    """Compute attention of all query rows over keys of one context (paper, section 2.2).

    Args:
        q_BQHD: queries.
        shard: keys and values, `k_1KGD, v_1KGD` if all batch rows share them, `k_BKGD, v_BKGD` if
            they were computed for each row.
        rule: scale, window and softcap.
        offsets: tokens from the shard's first key to the first query of each batch row.
    """
    B, Q, H, D = q_BQHD.shape
    batch, keys = shard[0].shape[:2]
    if rule.window is None and min(offsets) >= keys - 1:
        # Every row sees every key: batch rows that share keys become queries of one call, which
        # reads the keys once.
        state = attend(q_BQHD.reshape(batch, B // batch * Q, H, D), *shard, rule=rule, offset=keys)
        return State(state.out_BQHD.reshape(B, Q, H, -1), state.lse_BQH.reshape(B, Q, H))
    rows = []
    for b, offset in enumerate(offsets):
        k_1KGD, v_1KGD = shard if batch == 1 else (shard[0][b : b + 1], shard[1][b : b + 1])
        rows.append(attend(q_BQHD[b : b + 1], k_1KGD, v_1KGD, rule=rule, offset=offset))
    return State(torch.cat([r.out_BQHD for r in rows]), torch.cat([r.lse_BQH for r in rows]))


def tail_attention(
    q_BQHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, *, rule: Rule, padding: list[int]
) -> State:
    """Compute attention of query rows over the tail, whose last Q keys are their own.

    Args:
        q_BQHD: queries.
        k_BTGD: keys of the tail.
        v_BTGD: values of the tail.
        rule: scale, window and softcap.
        padding: first tail tokens of each batch row that are padding, which nobody sees.
    """
    T, Q = k_BTGD.shape[1], q_BQHD.shape[1]
    visible_BT = None
    if any(padding):
        first_B1 = torch.tensor(padding, device=q_BQHD.device)[:, None]
        visible_BT = torch.arange(T, device=q_BQHD.device)[None] >= first_B1
    return attend(q_BQHD, k_BTGD, v_BTGD, rule=rule, offset=T - Q, key_mask_BK=visible_BT)
