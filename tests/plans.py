"""Random plans of blocks, as a strategy of hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from star_attention.planning.plan import BlockPlan


def block_plans(
    *,
    tokens: int,
    block_size: int,
    ranks: SearchStrategy[int],
    lookback: SearchStrategy[int],
    stripe_tokens: int,
) -> SearchStrategy[BlockPlan]:
    """Return plans of up to this many tokens, in blocks and stripes of up to these sizes."""
    return st.builds(
        lambda tokens, block, anchor, ranks, lookback, stripe: BlockPlan(
            context_tokens=tokens,
            block_size=block,
            anchor_size=min(anchor, block),
            ranks=ranks,
            lookback=lookback,
            stripe_tokens=stripe,
        ),
        st.integers(1, tokens),
        st.integers(1, block_size),
        st.integers(0, block_size),
        ranks,
        lookback,
        st.integers(1, stripe_tokens),
    )
