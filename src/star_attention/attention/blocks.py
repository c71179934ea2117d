"""Attention of one forward of phase 1, and of phase 2 over a shard, made of `attend` and `merge`.

Axes: B batch, Q queries, K keys, A anchor tokens, T tail tokens, N blocks of a forward,
H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.state import State, join_batches, join_rows, merge, merge_last
from star_attention.planning.plan import BlockPlan, Span

KV = tuple[Tensor, Tensor]


def block_attention(
    q_BQHD: Tensor,
    own: KV,
    *,
    anchor: Callable[[], KV] | None,
    earlier: Callable[[], KV] | None,
    span: Span,
    plan: BlockPlan,
    rule: Rule,
    lookback: int = 0,
) -> State:
    """Compute attention of context tokens over their blocks and the anchor (paper, section 2.1).

    Keys of other tokens are asked for after attention to the block's own: they may be on their way
    from other ranks. They may be asked for twice.

    Args:
        q_BQHD: queries of the span's tokens.
        own: keys and values of these tokens, `k_BQGD, v_BQGD`.
        anchor: returns keys and values of the anchor, `k_BAGD, v_BAGD`, or of its end if the rest
            is out of the window; None while its tokens are in the span or in `earlier`, or if there
            are none.
        earlier: returns keys and values of the tokens before the span, from the first one that its
            first block sees through its window (`BlockPlan.first_seen`); None if there are none.
        span: the tokens: whole blocks, or a piece of one.
        plan: sizes of blocks and anchor.
        rule: scale, window and softcap.
        lookback: blocks before its own that a block sees in this layer.
    """
    Q = q_BQHD.shape[1]
    if Q > plan.block_size:
        state = _whole_blocks(q_BQHD, own, earlier, span, plan, rule, lookback)
    else:
        state = attend(q_BQHD, *own, rule=rule, offset=0)
        if earlier is not None:
            keys, values = earlier()
            before = attend(q_BQHD, keys, values, rule=rule, offset=keys.shape[1])
            state = merge([before, state])
    # The first blocks look back as far as the anchor. Every later one sees the whole anchor.
    first = max(0, (lookback + 1) * plan.block_size - span.start)
    if plan.anchor_size == 0 or first >= Q:
        return state
    if rule.window is not None and span.start + first - plan.anchor_size + 1 >= rule.window:
        return state
    if anchor is None:
        keys, values = own if earlier is None else earlier()
        assert span.start in (0, keys.shape[1]), "later forwards need the anchor"
        keys, values = keys[:, : plan.anchor_size], values[:, : plan.anchor_size]
    else:
        keys, values = anchor()
    offset = span.start + first - plan.anchor_size + keys.shape[1]
    over_anchor = attend(q_BQHD[:, first:], keys, values, rule=rule, offset=offset)
    return merge_last(state, over_anchor, dtype=rule.dtype)


def _whole_blocks(
    q_BQHD: Tensor,
    own: KV,
    earlier: Callable[[], KV] | None,
    span: Span,
    plan: BlockPlan,
    rule: Rule,
    lookback: int,
) -> State:
    """Compute attention of several whole blocks over themselves and the blocks before them."""
    size, Q = plan.block_size, q_BQHD.shape[1]
    ends_blocks = Q % size == 0 or span.stop == plan.context_tokens
    assert ends_blocks, "a forward holds whole blocks or a piece of one"
    last_start = (span.stop - 1) // size * size
    sees_all = lookback > 0 and last_start <= lookback * size
    state = None if sees_all else _in_blocks(size, q_BQHD, *own, rule=rule, offset=0)
    if state is not None and not lookback:
        return state
    k_BKGD, v_BKGD = own
    if earlier is not None:
        k_BKGD, v_BKGD = (torch.cat(pair, 1) for pair in zip(earlier(), own, strict=True))
    before = k_BKGD.shape[1] - Q
    if state is None:
        return attend(q_BQHD, k_BKGD, v_BKGD, rule=rule, offset=before)
    if rule.window is not None:
        lookback = min(lookback, -(-(rule.window - 1) // size))
        # Only what the window reaches is there. The rest of its first block is out of sight.
        missing = min(lookback * size, span.start) - before
        if missing > 0:
            k_BKGD, v_BKGD = (_padded(keys, missing) for keys in (k_BKGD, v_BKGD))
            before += missing
    for distance in range(size, (lookback + 1) * size, size):
        # A block that is at least so far from the start sees the block at this distance.
        first = max(0, distance - span.start)
        if first >= Q:
            break
        # A short last block sees all of a block before it.
        keys = slice(before + first - distance, before + last_start + size - span.start - distance)
        at_distance = _in_blocks(
            size, q_BQHD[:, first:], k_BKGD[:, keys], v_BKGD[:, keys], rule=rule, offset=distance
        )
        state = merge_last(state, at_distance)
    return state


def _padded(keys_BKGD: Tensor, tokens: int) -> Tensor:
    """Put zeros before keys or values."""
    return torch.nn.functional.pad(keys_BKGD, (0, 0, 0, 0, tokens, 0))


def _in_blocks(
    size: int, q_BQHD: Tensor, k_BQGD: Tensor, v_BQGD: Tensor, *, rule: Rule, offset: int
) -> State:
    """Let each block of queries attend to the block of keys at the same place, as a batch.

    The last block of queries may be short; it sees all keys from its own place on.
    """
    B, Q, H, _ = q_BQHD.shape
    N = Q // size
    full = N * size
    states = []
    if N:
        q, k, v = (t[:, :full].reshape(B * N, size, *t.shape[2:]) for t in (q_BQHD, k_BQGD, v_BQGD))
        out, lse = attend(q, k, v, rule=rule, offset=offset)
        states.append(State(out.reshape(B, full, H, -1), lse.reshape(B, full, H)))
    if full < Q:
        rest = (t[:, full:] for t in (q_BQHD, k_BQGD, v_BQGD))
        states.append(attend(*rest, rule=rule, offset=offset))
    return join_rows(states, dtype=states[0].out_BQHD.dtype)


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
    return join_batches(rows)


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
