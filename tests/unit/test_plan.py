"""Plans: sizes, blocks, ranks, forwards and their picture."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from star_attention import StarConfig
from star_attention.errors import SizeError, TokenError
from star_attention.planning.plan import BlockPlan
from star_attention.planning.sizes import (
    counted,
    default_block_size,
    format_size,
    parse_size,
    resolve_sizes,
)

K, M = 1024, 1024**2
PLANS = st.builds(
    lambda tokens, block, share, ranks: BlockPlan(
        context_tokens=tokens, block_size=block, anchor_size=int(share * block), ranks=ranks
    ),
    st.integers(1, 3000),
    st.integers(1, 400),
    st.floats(0, 1),
    st.integers(1, 9),
)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4k", 4 * K),
        ("128K", 128 * K),
        ("1m", M),
        ("2M", 2 * M),
        ("1g", K * M),
        ("1.5k", 1536),
        ("0.5m", 512 * K),
        ("3.0", 3),
        (" 4k ", 4 * K),
        (0, 0),
        ("-1", -1),
        ("-2k", -2 * K),
    ],
)
def test_sizes(text: Any, tokens: int) -> None:
    assert parse_size(text) == tokens
    assert type(parse_size(text)) is int


@pytest.mark.parametrize(
    "text",
    [
        "4x",
        "",
        " ",
        "k",
        "4kk",
        "four",
        "1e3",
        "nan",
        "inf",
        "1.0e400.",
        "0.3",
        "1.0001k",
        "4 000",
        "0x10",
        True,
        4.0,
        None,
        [4],
    ],
)
def test_invalid_sizes(text: Any) -> None:
    message = re.escape(
        f"block_size {text!r} is not a number of tokens; write 4096, '4k', '128k' or '1m'"
    )
    with pytest.raises(SizeError, match=message):
        parse_size(text, "block_size")


@settings(deadline=None)
@given(st.integers(1, 2**40))
def test_a_formatted_size_parses_to_the_same(tokens: int) -> None:
    assert parse_size(format_size(tokens).replace(",", "")) == tokens


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (1000, "1,000"), (1024, "1k"), (1536, "1,536"), (M, "1m"), (3 * M + K, "3073k")],
)
def test_sizes_are_formatted_short(tokens: int, text: str) -> None:
    assert format_size(tokens) == text


@pytest.mark.parametrize(
    ("tokens", "block"),
    [
        (1, K),
        (4 * K, K),
        (4 * K + 1, 2 * K),
        (8 * K, 2 * K),
        (16 * K, 4 * K),
        # The paper's table: a quarter of the sequence up to 128K, and 32K beyond.
        (32 * K, 8 * K),
        (64 * K, 16 * K),
        (128 * K, 32 * K),
        (128 * K + 1, 32 * K),
        (M, 32 * K),
        (100 * M, 32 * K),
    ],
)
def test_the_papers_block_sizes(tokens: int, block: int) -> None:
    assert default_block_size(tokens) == block
    assert resolve_sizes(tokens, None, None) == (block, block)
    assert resolve_sizes(tokens, None, 0) == (block, 0)


@settings(deadline=None)
@given(st.integers(1, 2**21))
def test_the_default_is_the_smallest_power_of_two_within_limits(tokens: int) -> None:
    powers = [2**n for n in range(10, 16)]
    assert powers[0] == 1024
    assert powers[-1] == 32768
    assert default_block_size(tokens) == next((p for p in powers if 4 * p >= tokens), powers[-1])


@pytest.mark.parametrize(
    ("block", "anchor", "message"),
    [
        ("4x", None, "block_size '4x' is not a number of tokens"),
        (
            0,
            None,
            "block_size 0 is below 1; give a positive number of tokens, or leave it out for the",
        ),
        (-5, None, "block_size -5 is below 1"),
        (8, "4y", "anchor_size '4y' is not a number of tokens"),
        (8, -1, r"anchor_size -1 is negative; give 0 \(no anchor\) to block_size 8"),
        (
            8,
            9,
            "anchor_size 9 is above block_size 8: .* lower anchor_size to at most 8 or raise",
        ),
        (None, 2000, "anchor_size 2000 is above block_size 1024"),
    ],
)
def test_incompatible_sizes(block: Any, anchor: Any, message: str) -> None:
    with pytest.raises(SizeError, match=message):
        resolve_sizes(100, block, anchor)
    with pytest.raises(SizeError, match=message):
        BlockPlan.resolve(100, block, anchor)


def test_sizes_at_their_limits_work() -> None:
    assert resolve_sizes(100, 1, 0) == (1, 0)
    assert resolve_sizes(100, "8", "8") == (8, 8)
    assert resolve_sizes(100, 8, None) == (8, 8)


@pytest.mark.parametrize("tokens", [0, -3])
def test_an_empty_context(tokens: int) -> None:
    with pytest.raises(
        TokenError, match=rf"the context is empty \({tokens} tokens\); .* at least 1 token"
    ):
        BlockPlan.resolve(tokens)


def test_no_ranks() -> None:
    with pytest.raises(SizeError, match="ranks 0 is below 1"):
        BlockPlan.resolve(100, ranks=0)


def test_a_config_resolves_to_a_plan() -> None:
    plan = StarConfig.of(block_size="2k", anchor_size="1k").plan(5000, ranks=2)
    assert (plan.context_tokens, plan.block_size, plan.anchor_size, plan.ranks) == (
        5000,
        2048,
        1024,
        2,
    )


# ---------------------------------------------------------------------- blocks


@settings(deadline=None)
@given(PLANS)
def test_blocks_cover_the_context_once(plan: BlockPlan) -> None:
    blocks = plan.blocks
    assert len(blocks) == plan.num_blocks
    assert [t for start, stop in blocks for t in range(start, stop)] == list(
        range(plan.context_tokens)
    )
    assert all(stop - start == plan.block_size for start, stop in blocks[:-1])
    assert 1 <= blocks[-1][1] - blocks[-1][0] <= plan.block_size
    assert plan.is_dense == (plan.context_tokens <= plan.block_size)


@settings(deadline=None)
@given(PLANS)
def test_ranks_hold_contiguous_runs_that_cover_all_blocks(plan: BlockPlan) -> None:
    runs = [plan.rank_blocks(rank) for rank in range(plan.ranks)]
    assert [block for run in runs for block in run] == plan.blocks
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    for rank, run in enumerate(runs):
        start, stop = plan.rank_range(rank)
        assert (start, stop) == (
            (run[0][0], run[-1][1]) if run else (plan.context_tokens, plan.context_tokens)
        )


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_dense_is_one_block_without_an_anchor(tokens: int) -> None:
    plan = BlockPlan.dense(tokens)
    assert plan.is_dense
    assert plan.blocks == [(0, tokens)]
    assert plan.anchor_size == 0


# ---------------------------------------------------------------------- forwards


@settings(deadline=None)
@given(PLANS, st.integers(1, 900), st.data())
def test_forwards_cover_their_tokens_once(
    plan: BlockPlan, budget: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, plan.ranks - 1))
    start = data.draw(st.integers(0, plan.context_tokens))
    first, stop = plan.rank_range(rank)
    spans, later = (
        list(plan.spans(budget, rank=rank)),
        list(plan.between(start, plan.context_tokens, budget)),
    )
    assert [token for span in spans for token in range(span.start, span.stop)] == list(
        range(first, stop)
    )
    assert [token for span in later for token in range(span.start, span.stop)] == list(
        range(start, plan.context_tokens)
    )
    for span in spans + later:
        assert 1 <= span.tokens <= budget
        assert span.block_start == span.start // plan.block_size * plan.block_size
        ends_block = span.tokens % plan.block_size == 0 or span.stop == plan.context_tokens
        whole = span.start == span.block_start and ends_block
        piece = span.stop <= min(span.block_start + plan.block_size, plan.context_tokens)
        assert whole or piece


@settings(deadline=None)
@given(PLANS, st.integers(1, 900))
def test_forwards_are_as_large_as_possible(plan: BlockPlan, budget: int) -> None:
    """Forbids one forward per block if several blocks fit."""
    if budget < plan.block_size:
        return
    spans = [span for span in plan.spans(budget) if span.tokens >= plan.block_size]
    assert all(span.tokens + plan.block_size > budget for span in spans[:-1])


@pytest.mark.parametrize(
    ("tokens", "block", "budget", "expected"),
    [
        (4000, 1024, 8192, [4000]),  # As dense attention would take.
        (8192 + 100, 1024, 8192, [8192, 100]),
        (8192 + 2048 + 100, 1024, 8192, [8192, 2148]),
        (3 * 6000 + 100, 6000, 8192, [6000, 6000, 6000, 100]),  # Compiled for 6000.
        (6000 + 100, 6000, 8192, [6100]),
    ],
)
def test_a_short_last_block_joins_the_blocks_before_it(
    tokens: int, block: int, budget: int, expected: list[int]
) -> None:
    """Forbids a forward for a few tokens, where all of them wait for launches."""
    plan = BlockPlan.resolve(tokens, block)
    assert [span.tokens for span in plan.spans(budget)] == expected
    striped = BlockPlan.resolve(tokens, block, ranks=2, lookback=1)
    for rank in range(2):
        assert all(
            span.tokens % block == 0 or span.tokens < block
            for span in striped.spans(budget, rank=rank)
        )


# ---------------------------------------------------------------------- the picture


@pytest.mark.parametrize(
    ("tokens", "block", "anchor", "ranks"),
    [(72, 20, 5, 1), (72, 20, 20, 3), (72, 24, 0, 2), (72, 72, 72, 1), (72, 5, 4, 4)],
)
def test_the_picture_shows_what_each_block_sees(
    tokens: int, block: int, anchor: int, ranks: int
) -> None:
    """With one column per token, the picture is the law."""
    plan = BlockPlan(context_tokens=tokens, block_size=block, anchor_size=anchor, ranks=ranks)
    lines = plan.draw(width=tokens).splitlines()
    assert len(lines) == plan.num_blocks + 1
    for index, ((start, stop), line) in enumerate(zip(plan.blocks, lines[:-1], strict=True)):
        picture = "".join(
            "#" if start <= t < stop else "A" if t < anchor else "." for t in range(tokens)
        )
        owner = next(rank for rank in range(ranks) if (start, stop) in plan.rank_blocks(rank))
        assert line.split("|")[1] == picture
        assert line.split("|")[0].split() == ["rank", str(owner), f"b{index}"]
        assert line.split("|")[2].strip() == f"{start:,}..{stop:,}"
    assert lines[-1].split("|")[1] == "#" * tokens
    assert "query" in lines[-1]
    assert "sees everything" in lines[-1]


def test_a_long_picture_states_what_it_leaves_out() -> None:
    plan = BlockPlan(context_tokens=100 * K, block_size=K, anchor_size=K)
    lines = plan.draw().splitlines()
    assert len(lines) == 8 + 1 + 7 + 1
    assert "85 more blocks" in lines[8]
    assert lines[9].endswith(f"{93 * K:,}..{94 * K:,}")
    shown = [line for line in lines if re.search(r"b\d+ ", line)]
    assert len(shown) + 85 == plan.num_blocks
    assert all("#" in line for line in shown)
    assert (
        len(BlockPlan(context_tokens=16 * K, block_size=K, anchor_size=0).draw().splitlines()) == 17
    )


def test_a_printed_plan_names_its_sizes() -> None:
    plan = BlockPlan(context_tokens=128 * K, block_size=16 * K, anchor_size=16 * K, ranks=2)
    assert str(plan).splitlines()[0] == "context 131,072 tok, 8 blocks x 16k, anchor 16k, 2 ranks"
    assert str(BlockPlan.dense(5)).splitlines()[0] == "context 5 tok, 1 block x 5, anchor 0, 1 rank"
    assert plan.draw() in str(plan)


def test_counts_have_the_right_plural() -> None:
    """Forbids `1 blocks`."""
    assert [counted(number, "block") for number in (0, 1, 2, 2000)] == [
        "0 blocks",
        "1 block",
        "2 blocks",
        "2,000 blocks",
    ]
