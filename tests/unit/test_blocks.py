"""Attention of phase 1 by blocks and of phase 2 by shard and tail, against the oracle in float64.

Law 1 at this level: one block is dense.

Axes: B batch, Q queries, K keys, L context tokens, T tail tokens, H query heads, G KV heads,
D head size of keys, V of values.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.blocks import block_attention, shard_attention, tail_attention
from star_attention.attention.oracle import law_mask
from star_attention.attention.state import State, merge
from star_attention.planning.plan import BlockPlan, Span
from tests.attention_cases import BATCH, DTYPES, Case, assert_within_budget, right_of, tensors
from tests.tiers import in_turn

LENGTH, H, G, D, V = 101, 6, 3, 16, 12
# Each dtype, and softcap in one of them: what it adds does not depend on the dtype.
PLAIN = (torch.float32, None)
HALVES = [dtype for dtype in DTYPES if dtype.itemsize < 4]
KINDS = [PLAIN, (torch.float32, 2.0), *((dtype, None) for dtype in HALVES)]
OTHER_KINDS = [(dtype, 2.0) for dtype in HALVES]


def context(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(Case(LENGTH, LENGTH, 0), (H, G), (D, V), dtype)


def by_blocks(
    plan: BlockPlan, forward: int, rule: Rule, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor
) -> State:
    """Compute phase 1's attention, one forward after the other, with the inputs of phase 1."""
    parts = []
    for span in plan.spans(forward):
        first = plan.first_seen(span.block_start, plan.lookback, rule.window)
        own, before = slice(span.start, span.stop), slice(first, span.start)
        anchor = k_BLGD[:, : plan.anchor_size], v_BLGD[:, : plan.anchor_size]
        earlier = k_BLGD[:, before], v_BLGD[:, before]
        state = block_attention(
            q_BLHD[:, own],
            (k_BLGD[:, own], v_BLGD[:, own]),
            anchor=partial(tuple, anchor) if first > 0 and plan.anchor_size else None,
            earlier=partial(tuple, earlier) if span.start > first else None,
            span=span,
            plan=plan,
            rule=rule,
            lookback=plan.lookback,
        )
        assert state.out_BQHD.shape == (BATCH, span.tokens, H, V)
        parts.append(state)
    return State(
        torch.cat([s.out_BQHD.float() for s in parts], 1), torch.cat([s.lse_BQH for s in parts], 1)
    )


BLOCKS = [(20, 20), (20, 7), (20, 0), (20, 1), (101, 9), (200, 200), (1, 1), (50, 50)]
WINDOWS = [None, 1, 13, 30, 90]
LOOKBACKS = [0, 1, 2, 6]


# Each law in float32 without softcap, and in turn in one of the other quick kinds.
@pytest.mark.parametrize(
    ("block", "anchor", "window", "lookback", "dtype", "softcap"),
    [
        *in_turn(3, BLOCKS, WINDOWS, LOOKBACKS, KINDS, quick=lambda *case: case[4:] == PLAIN),
        *in_turn(0, BLOCKS, WINDOWS, LOOKBACKS, OTHER_KINDS),
    ],
)
def test_blocks_equal_the_law(
    block: int,
    anchor: int,
    window: int | None,
    lookback: int,
    dtype: torch.dtype,
    softcap: float | None,
) -> None:
    """Blocks as a batch, one block at a time, and pieces of blocks; the last one is ragged."""
    q_BLHD, k_BLGD, v_BLGD = context(dtype)
    plan = BlockPlan(context_tokens=LENGTH, block_size=block, anchor_size=anchor, lookback=lookback)
    rule = Rule(scale=0.3, window=window, softcap=softcap)
    positions_L = torch.arange(LENGTH)
    keep_LL = law_mask(
        positions_L,
        positions_L,
        context_tokens=LENGTH,
        block_size=block,
        anchor_size=anchor,
        window=window,
        lookback=lookback,
    )
    if block * (lookback + 1) >= LENGTH and window is None:
        assert torch.equal(keep_LL, torch.ones_like(keep_LL).tril()), "law 1: one block is dense"
    right = right_of(q_BLHD, k_BLGD, v_BLGD, keep_LL.expand(BATCH, -1, -1), rule)
    for forward in (7, 20, 45, 1000):
        right.check(by_blocks(plan, forward, rule, q_BLHD, k_BLGD, v_BLGD))


def test_a_forward_holds_whole_blocks_or_a_piece_of_one() -> None:
    q_BLHD, k_BLGD, v_BLGD = context(torch.float32)
    with pytest.raises(AssertionError, match="whole blocks or a piece of one"):
        block_attention(
            q_BLHD[:, :30],
            (k_BLGD[:, :30], v_BLGD[:, :30]),
            anchor=None,
            earlier=None,
            span=Span(start=0, stop=30, block_start=0),
            plan=BlockPlan(context_tokens=LENGTH, block_size=20, anchor_size=0),
            rule=Rule(scale=0.3),
        )


@pytest.mark.parametrize(("dtype", "softcap"), [*KINDS, *in_turn(0, OTHER_KINDS)])
@pytest.mark.parametrize("window", [None, 1, 9, 40, 300])
@pytest.mark.parametrize("padding", [[0, 0], [0, 4], [8, 3]])
@pytest.mark.parametrize(("tail", "queries"), [(9, 9), (23, 9), (14, 1)])
def test_shard_and_tail_equal_the_law(
    tail: int,
    queries: int,
    padding: list[int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Rows share a context and are padded on the left; each equals itself alone, unpadded."""
    rule = Rule(scale=0.3, window=window, softcap=softcap)
    q_BTHD, k_BTGD, v_BTGD = tensors(Case(tail, tail, 0), (H, G), (D, V), dtype)
    q_BQHD = q_BTHD[:, tail - queries :]
    _, k_BLGD, v_BLGD = context(dtype)
    shard = k_BLGD[:1], v_BLGD[:1]
    before = tail - queries
    offsets = [LENGTH + before - pad for pad in padding]
    over_shard = shard_attention(q_BQHD, shard, rule=rule, offsets=offsets)
    over_tail = tail_attention(q_BQHD, k_BTGD, v_BTGD, rule=rule, padding=padding)
    state = merge([over_shard, over_tail])
    assert not state.out_BQHD.isnan().any()
    for b, pad in enumerate(padding):
        # Padding among the queries: nothing reads its results.
        gap = max(0, pad - before)
        keys, values = (
            torch.cat([s, t[b : b + 1, pad:]], 1)
            for s, t in zip(shard, (k_BTGD, v_BTGD), strict=True)
        )
        positions_K = torch.arange(LENGTH + tail - pad)
        positions_Q = positions_K[len(positions_K) - queries + gap :]
        # Query and generated tokens see every block, so the block size does not matter.
        keep_QK = law_mask(
            positions_Q,
            positions_K,
            context_tokens=LENGTH,
            block_size=20,
            anchor_size=0,
            window=window,
        )
        row = State(state.out_BQHD[b : b + 1, gap:], state.lse_BQH[b : b + 1, gap:])
        assert_within_budget(row, q_BQHD[b : b + 1, gap:], keys, values, keep_QK[None], rule)


def drawn(keep_QK: Tensor) -> list[str]:
    return ["".join(".x"[int(keep)] for keep in row) for row in keep_QK.tolist()]


def test_the_law_lets_a_query_see_everything_and_a_block_itself_and_the_anchor() -> None:
    """The oracle itself, drawn by hand."""
    positions = torch.arange(8)
    keep = law_mask(positions, positions, context_tokens=6, block_size=2, anchor_size=1)
    assert drawn(keep) == [
        "x.......",
        "xx......",
        "x.x.....",
        "x.xx....",
        "x...x...",
        "x...xx..",
        "xxxxxxx.",
        "xxxxxxxx",
    ]
    windowed = law_mask(
        positions, positions, context_tokens=6, block_size=2, anchor_size=1, window=4
    )
    assert drawn(windowed) == [
        "x.......",
        "xx......",
        "x.x.....",
        "x.xx....",
        "....x...",
        "....xx..",
        "...xxxx.",
        "....xxxx",
    ]
