"""Phase 1's attention over one forward, and phase 2's over a shard, from `attend` and `merge` alone.

Axes: B batch, Q queries, K keys, N blocks in a forward, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.state import State, merge, merge_last

KV = tuple[Tensor, Tensor]


def block_attention(
    q_BQHD: Tensor,
    own: KV,
    *,
    anchor: KV | None,
    earlier: KV | None,
    start: int,
    block_start: int,
    block_size: int,
    anchor_size: int,
    rule: Rule,
) -> State:
    """Each context token over its own block and the anchor (paper, section 2.1).

    The Q tokens from position `start` are whole blocks, or a piece of the block that begins at `block_start`.
    own: their `k_BQGD, v_BQGD`; earlier: those of the block's tokens before `start`; anchor: `k_BAGD, v_BAGD` of the first
    `anchor_size` context tokens, None while they are in this very forward.
    """
    B, Q, H, _ = q_BQHD.shape
    k_BQGD, v_BQGD = own
    if Q > block_size:
        # Blocks do not see each other: they are a batch of square causal calls.
        N = Q // block_size
        assert N * block_size == Q, "a forward holds whole blocks or a piece of one"
        q, k, v = (t.reshape(B * N, block_size, *t.shape[2:]) for t in (q_BQHD, k_BQGD, v_BQGD))
        folded = attend(q, k, v, rule=rule, offset=0)
        state = State(folded.out_BQHD.reshape(B, Q, H, -1), folded.lse_BQH.reshape(B, Q, H))
    else:
        state = attend(q_BQHD, k_BQGD, v_BQGD, rule=rule, offset=0)
    if earlier is not None:
        state = merge([attend(q_BQHD, *earlier, rule=rule, offset=start - block_start), state])
    # The first block is the anchor's own; every later one sees the anchor whole.
    first = max(0, block_size - start) if block_start == 0 else 0
    if anchor_size == 0 or first >= Q:
        return state
    if anchor is None:
        assert start == 0, "later forwards are given the anchor"
        anchor = (k_BQGD[:, :anchor_size], v_BQGD[:, :anchor_size])
    seen = attend(q_BQHD[:, first:], *anchor, rule=rule, offset=start + first)
    return merge_last(state, seen, dtype=rule.dtype)


def shard_attention(q_BQHD: Tensor, shard: KV, *, rule: Rule, offsets: list[int]) -> State:
    """All query rows over keys of one context (paper, section 2.2): `k_1KGD, v_1KGD`, which every batch row shares, or
    `k_BKGD, v_BKGD`, where they were computed for each row.

    offsets: for each batch row, the position of its first query after the shard's first key.
    """
    B, Q, H, D = q_BQHD.shape
    batch, keys = shard[0].shape[:2]
    if rule.window is None and min(offsets) >= keys - 1:
        # Everything is visible to everybody: rows of all batch entries that share keys are queries of one call that reads
        # them once.
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
    """Query rows over the tail, whose last Q entries are their own keys; `padding[b]` first entries of row b are void."""
    T, Q = k_BTGD.shape[1], q_BQHD.shape[1]
    visible_BT = None
    if any(padding):
        first_B1 = torch.tensor(padding, device=q_BQHD.device)[:, None]
        visible_BT = torch.arange(T, device=q_BQHD.device)[None] >= first_B1
    return attend(q_BQHD, k_BTGD, v_BTGD, rule=rule, offset=T - Q, key_mask_BK=visible_BT)
