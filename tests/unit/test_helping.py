"""What rank 0 computes for other ranks: planned so that the busiest rank has less to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention import StarConfig, StarLLM
from star_attention.bench.models import SHAPES
from star_attention.errors import InvalidInputError
from star_attention.hf.execution.layer_part import HiddenShape, LayerPart, layers_of
from star_attention.hf.shape import model_shape
from star_attention.planning import cost, estimate, helping
from star_attention.planning.hardware import HARDWARE
from star_attention.planning.helping import helps, helps_of_shape
from star_attention.planning.plan import BlockPlan
from tests.engines import tiny
from tests.families import FAMILIES
from tests.tiers import in_turn

K = 1024


def plan_of(context: int, block: int, ranks: int, **settings: Any) -> BlockPlan:
    return BlockPlan.resolve(context * K, block * K, ranks=ranks, **settings)


@pytest.mark.parametrize(
    ("context", "block", "ranks", "layers"),
    [
        # Two ranks share what the first block lacks: 16K of 49K pairs a token.
        (128, 16, 2, [5]),
        # Rank 1 also waits for the first half of the anchor.
        (128, 32, 2, [11]),
        (128, 16, 4, [2, 2, 2]),
        # One block each: rank 0 would be ready too late.
        (128, 32, 4, []),
        # Not worth the transfers.
        (1024, 8, 2, []),
    ],
)
def test_the_plan_of_an_8b_model(context: int, block: int, ranks: int, layers: list[int]) -> None:
    plan = plan_of(context, block, ranks)
    given = helps(plan, layers=32, tokens_per_forward=16 * K)
    assert [each.layers for each in given] == layers
    assert [each.rank for each in given] == list(range(1, 1 + len(layers)))
    # The last block of each.
    assert all((each.start, each.stop) == plan.rank_blocks(each.rank)[-1] for each in given)


def test_nobody_is_helped_where_blocks_look_back_or_ranks_compute_anchors() -> None:
    shape = model_shape(tiny("llama").config, "float32")
    plan = plan_of(128, 32, 2)
    settings: dict[str, Any] = dict(tokens_per_forward=16 * K)
    assert helps_of_shape(shape, plan, **settings)
    assert not helps_of_shape(shape, plan, **settings, anchor_source="local")
    assert not helps_of_shape(shape, plan, **settings, balance_ranks=False)
    assert not helps_of_shape(shape, plan_of(128, 32, 2, lookback=1), **settings)
    assert not helps_of_shape(shape, plan_of(128, 32, 2, anchor_size=0), **settings)
    assert not helps_of_shape(shape, plan_of(128, 32, 1), **settings)


@settings(deadline=None)
@given(
    tokens=st.integers(1, 400),
    block=st.integers(1, 40),
    anchor=st.integers(1, 40),
    ranks=st.integers(2, 6),
    forward=st.integers(1, 60),
    layers=st.integers(1, 12),
)
def test_ranks_have_the_same_work_together_and_the_busiest_less(
    tokens: int, block: int, anchor: int, ranks: int, forward: int, layers: int
) -> None:
    plan = BlockPlan(
        context_tokens=tokens, block_size=block, anchor_size=min(anchor, block), ranks=ranks
    )
    given = helps(plan, layers=layers, tokens_per_forward=forward)
    assert len({each.rank for each in given}) == len(given)
    for each in given:
        assert 0 < each.layers < layers
        assert 0 < each.rank < plan.busy_ranks
        spans = list(plan.spans(forward, rank=each.rank))
        run = each.spans(plan, forward)
        # Its own forwards, whole blocks, and not the first of them, which the anchor comes with.
        assert all(span in spans for span in run)
        assert run[0].start == run[0].block_start > spans[0].block_start
        assert run[-1].stop == each.stop
        assert each.stop % block == 0 or each.stop == tokens
        ordered = list(helping.in_order(spans, run))
        assert sorted(ordered, key=lambda span: span.start) == spans
        assert ordered[-len(run) :] == run


def test_operations_move_from_rank_to_rank() -> None:
    shape = model_shape(tiny("llama").config, "float32")
    plan = plan_of(128, 32, 2)
    settings: dict[str, Any] = dict(tokens_per_forward=16 * K)
    given = helps_of_shape(shape, plan, **settings)

    def by_rank(given: Any) -> list[int]:
        return [
            cost.phase1(shape, plan, rank=rank, helps=given, **settings).total for rank in (0, 1)
        ]

    before, after = by_rank(()), by_rank(given)
    assert sum(before) == pytest.approx(sum(after))
    assert before[0] < after[0]
    assert max(after) < max(before)


@pytest.mark.parametrize(("block", "less"), [(32, 0.85), (16, 0.97)])
def test_phase_1_is_predicted_to_take_less_time(block: int, less: float) -> None:
    from transformers import LlamaConfig

    shape = model_shape(LlamaConfig(**SHAPES["llama-3.1-8b"]), "bfloat16")

    plan, on = plan_of(128, block, 2), HARDWARE["h200-nvlink"]
    balanced_s, own_s = (
        estimate.estimate(
            shape, on, "star", plan, tokens_per_forward=16 * K, balance_ranks=balance_ranks
        ).encode_s
        for balance_ranks in (True, False)
    )
    assert (less - 0.02) * own_s < balanced_s < less * 1.02 * own_s


def test_the_switch_is_on_or_off() -> None:
    assert StarConfig().balance_ranks
    with pytest.raises(InvalidInputError, match="expected True or False, got 'no'; leave it out"):
        StarConfig(balance_ranks="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", in_turn(4, list(FAMILIES)))
def test_models_whose_layers_can_be_split_are_those_that_are_counted(name: str) -> None:
    """What the plan of a config says, the model itself must allow."""
    model = tiny(name)
    handle = StarLLM(model).runtime.handle
    splits = handle.probe_result.hidden is not None and not any(handle.windows)
    if name == "longcat_flash":
        assert not splits
        return
    shape = model_shape(model.config, "float32")
    assert splits == bool(helps_of_shape(shape, plan_of(128, 32, 2), tokens_per_forward=16 * K))
    if splits:
        assert handle.probe_result.hidden == HiddenShape(
            elements=shape.hidden_size, dtype=torch.float32
        )


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 2])
def test_two_parts_make_a_forward(split: int) -> None:
    model = tiny("llama")
    decoder = model.get_decoder()
    ids_1S = torch.arange(5, 15)[None]
    whole = decoder(input_ids=ids_1S).last_hidden_state
    layers = layers_of(decoder)
    before = [dict(vars(layer)) for layer in layers]
    first = LayerPart(layers, stop=split)
    with first.active():
        decoder(input_ids=ids_1S)
    assert not first.is_last
    rest = LayerPart(layers, first=split, hidden_BSE=first.ended_BSE)
    assert rest.is_last
    with rest.active():
        # The ids do not matter but for their number: hidden states replace what they begin with.
        ended = decoder(input_ids=torch.zeros_like(ids_1S)).last_hidden_state
    assert torch.equal(ended, whole)
    assert [dict(vars(layer)) for layer in layers] == before
    with pytest.raises(ZeroDivisionError), LayerPart(layers, stop=1).active():
        _ = 1 / 0
    assert [dict(vars(layer)) for layer in layers] == before


def test_a_layer_that_returns_something_else_cannot_be_passed() -> None:
    hidden = torch.zeros(1, 4, 8)
    assert HiddenShape.of(hidden, hidden + 1) == HiddenShape(elements=8, dtype=torch.float32)
    for before, after in (
        (hidden, (hidden,)),
        (hidden, None),
        (None, None),
        (hidden, hidden[:, 1:]),
        (hidden, hidden.half()),
        (hidden[None], hidden[None]),
    ):
        assert HiddenShape.of(before, after) is None
