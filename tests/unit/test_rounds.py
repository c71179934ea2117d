"""Times of phase 1 where blocks look back across ranks, against what `plan` counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.planning import cost, estimate, rounds, traffic
from star_attention.planning.hardware import HARDWARE, Hardware
from star_attention.planning.model_shape import AttentionShape, ModelShape
from star_attention.planning.plan import BlockPlan
from tests.engines import BUNDLED
from tests.plans import block_plans

WHOLE = AttentionShape(heads=6, kv_heads=2, k_head_size=5, v_head_size=4)
WINDOWED = dataclasses.replace(WHOLE, window=9)
SHAPE = ModelShape(
    name="test",
    layers=5,
    hidden_size=30,
    attention=(WHOLE, WINDOWED, WHOLE, WINDOWED, WHOLE),
    # The last layer reads the third one's keys.
    kv_elements_by_layer=(18, 18, 18, 18, 0),
    kv_scales_per_token=16,
    linear_parameters=1000,
    head_parameters=77,
    parameters=1077,
    bytes_per_element=2,
)
PLANS = block_plans(
    tokens=300,
    block_size=40,
    ranks=st.integers(2, 7),
    lookback=st.integers(1, 9),
    stripe_tokens=200,
)


def device(**values: float) -> Hardware:
    """Return a device on which nothing takes time but what `values` names."""
    free = dict.fromkeys(("matrix", "attention", "bandwidth", "memory", "link"), 1e30)
    return Hardware(name="test", **(free | {"latency": 1e-30} | values))


@settings(deadline=None)
@given(PLANS, st.booleans())
def test_as_many_exchanges_and_bytes_as_counted(plan: BlockPlan, broadcasts: bool) -> None:
    """The busiest rank of an exchange moves at most all of its bytes, and at least its share."""
    source = "broadcast" if broadcasts else "local"
    counted = traffic.phase1_cp(SHAPE, plan, tokens_per_forward=50, anchor_source=source)
    anchor = broadcasts and plan.anchor_size > 0 and plan.busy_ranks > 1
    calls = rounds.times(SHAPE, device(latency=1.0), plan, sends_anchor=anchor).wire_s
    assert calls == pytest.approx(counted.calls)
    sent = rounds.times(SHAPE, device(link=1.0), plan, sends_anchor=anchor).wire_s
    assert sent <= counted.bytes * (1 + 1e-9)
    assert sent * plan.busy_ranks >= counted.bytes * (1 - 1e-9)


@settings(deadline=None)
@given(PLANS)
def test_rounds_take_at_least_the_share_of_each_rank(plan: BlockPlan) -> None:
    on = device(matrix=1.0, attention=1.0)
    compute_s = rounds.times(SHAPE, on, plan, sends_anchor=False).compute_s
    work = [
        cost.phase1(SHAPE, plan, tokens_per_forward=50, rank=rank).total
        for rank in range(plan.ranks)
    ]
    assert max(work) <= compute_s * (1 + 1e-9)
    assert compute_s <= sum(work) * (1 + 1e-9)


def by_hand(*, link: float, **changes: Any) -> tuple[float, float]:
    """Return wire and exposed seconds of 8 blocks of 10 tokens on two ranks, one block back."""
    plan = BlockPlan(
        context_tokens=80, block_size=10, anchor_size=0, ranks=2, lookback=1, stripe_tokens=10
    )
    shape = dataclasses.replace(SHAPE, **changes)
    times = rounds.times(shape, device(link=link, attention=1.0), plan, sends_anchor=False)
    return times.wire_s, times.exposed_s


def test_the_exchange_hides_after_attention_inside_the_block() -> None:
    """Each round sends keys and values both ways, of a block or as many as the window reaches."""
    sent, sent_in_window = 10 * 18 * 2, 8 * 18 * 2
    own, own_in_window = 55 * 2 * 6 * 9, 54 * 2 * 6 * 9
    assert by_hand(link=1.0) == pytest.approx((4 * 2 * (sent + sent_in_window), 0))
    wire_s, exposed_s = by_hand(link=0.01)
    assert wire_s == pytest.approx(4 * 2 * (sent + sent_in_window) * 100)
    assert exposed_s == pytest.approx(
        4 * 2 * (sent * 100 - own + sent_in_window * 100 - own_in_window)
    )


def test_mla_hides_nothing() -> None:
    wire_s, exposed_s = by_hand(link=1.0, expansion_parameters=10)
    assert wire_s == exposed_s > 0


def test_several_blocks_that_see_all_before_them_wait_for_the_exchange() -> None:
    """They attend in one call, to everything, and not to their own blocks first."""
    plan = BlockPlan(
        context_tokens=80, block_size=10, anchor_size=0, ranks=2, lookback=7, stripe_tokens=40
    )
    assert plan.stripes is not None
    assert plan.stripes.rounds == 1
    times = rounds.times(SHAPE, device(attention=1.0, link=1e6), plan, sends_anchor=False)
    assert times.exposed_s == times.wire_s > 0


def test_looking_back_is_in_the_estimate() -> None:
    """More blocks back take longer, and ring attention and the official scheme know of none."""

    def times(scheme: str, **settings: Any) -> estimate.Estimate:
        plan = BlockPlan.resolve(2**17, 2**13, ranks=2, **settings)
        on = HARDWARE["h200-ib"]
        return estimate.estimate(SHAPE, on, scheme, plan, tokens_per_forward=2**14)

    near, far = (times("star", lookback=blocks).encode_s for blocks in (1, 4))
    assert near < far
    local = times("star-local", lookback=1)
    assert local.compute_s > times("star", lookback=1).compute_s
    assert local.wire_s > 0, "blocks travel, if not the anchor"
    for scheme in ("official", "ring", "ring-plain"):
        assert times(scheme, lookback=4) == times(scheme)


def test_estimate_takes_look_back_as_plan_does() -> None:
    settings = ["-m", str(BUNDLED), "--context", "16k", "--ranks", "2", "--quality", "high"]
    settings += ["--block-size", "2k", "--json"]
    estimated, planned = (
        json.loads(CliRunner().invoke(app, [command, *settings]).stdout)
        for command in ("estimate", "plan")
    )
    (row,) = estimated["estimates"]
    assert row["star"]["encode_s"] == planned["predicted"]["phase1_s"]
    assert row["ring"]["encode_s"] == planned["predicted"]["phase1_ring_s"]
    assert row["star"]["wire_s"] > planned["wire_bytes_phase1"] / 2 / HARDWARE["h200-nvlink"].link
