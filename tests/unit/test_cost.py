"""The cost model against brute force: the law's mask, and contexts that are really encoded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from star_attention.attention.oracle import law_mask
from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.loading import tensor_parallel
from star_attention.hf.shape import model_shape
from star_attention.planning import cost, pairs, stored
from star_attention.planning.model_shape import AttentionShape, ModelShape
from star_attention.planning.plan import BlockPlan
from tests.engines import BUNDLED, engine, ids, tiny
from tests.families import FAMILIES, REFUSED, UNUSUAL
from tests.plans import block_plans

SHAPE = ModelShape(
    name="made up",
    layers=2,
    hidden_size=7,
    attention=(
        AttentionShape(heads=6, kv_heads=3, k_head_size=5, v_head_size=4),
        AttentionShape(heads=6, kv_heads=3, k_head_size=5, v_head_size=4, window=9),
    ),
    kv_elements_by_layer=(3 * (5 + 4), 3 * (5 + 4)),
    kv_scales_per_token=2 * (3 + 3),
    linear_parameters=1000,
    head_parameters=77,
    parameters=1300,
    bytes_per_element=2,
)

plans = block_plans(
    tokens=60,
    block_size=25,
    ranks=st.integers(1, 4),
    lookback=st.integers(0, 3),
    stripe_tokens=30,
)
windows = st.none() | st.integers(1, 70)


def keys_seen(plan: BlockPlan, window: int | None, new_tokens: int = 0) -> torch.Tensor:
    """The number of keys that each token sees in the law's mask, `[tokens]`."""
    positions = torch.arange(plan.context_tokens + new_tokens)
    mask = law_mask(
        positions,
        positions,
        context_tokens=plan.context_tokens,
        block_size=plan.block_size,
        anchor_size=plan.anchor_size,
        window=window,
        lookback=plan.lookback,
    )
    return mask.sum(1)


# ------------------------------------------------------------------ pairs


@settings(max_examples=300, deadline=None)
@given(plans, windows)
def test_pairs_of_the_context_equal_the_laws_mask(plan: BlockPlan, window: int | None) -> None:
    seen = keys_seen(plan, window)
    assert pairs.context_pairs(plan, window, lookback=plan.lookback) == int(seen.sum())
    for rank in range(plan.ranks):
        own = pairs.context_pairs(plan, window, plan.layout[rank], plan.lookback)
        assert own == sum(int(seen[a:b].sum()) for a, b in plan.layout[rank])


@settings(max_examples=100, deadline=None)
@given(plans, windows, st.integers(0, 20))
def test_pairs_of_the_answer_equal_the_laws_mask(
    plan: BlockPlan, window: int | None, new: int
) -> None:
    seen = keys_seen(plan, window, new)[plan.context_tokens :]
    assert pairs.answer_pairs(plan.context_tokens, new, window) == int(seen.sum())


def test_a_million_tokens_are_counted_in_closed_form() -> None:
    """Forbids a loop over tokens, also with windows."""
    plan = BlockPlan.resolve(1024**2, 1024)
    assert (
        pairs.context_pairs(plan, 1500)
        < pairs.context_pairs(plan)
        < pairs.context_pairs(BlockPlan.dense(1024**2))
    )


# ------------------------------------------------------------------ operations


@pytest.mark.parametrize("window", [None, 9])
def test_attention_operations_of_phase_1_equal_a_count_by_hand(window: int | None) -> None:
    plan = BlockPlan(context_tokens=50, block_size=16, anchor_size=7)
    flops = cost.phase1(SHAPE, plan, tokens_per_forward=32)
    by_hand = sum(
        int(keys_seen(plan, call.window).sum()) * 2 * 6 * (5 + 4) for call in SHAPE.attention
    )
    assert flops.attention == by_hand
    assert flops.linear == 2 * 1000 * 50
    assert flops.expansion == flops.head == 0
    assert flops.total == by_hand + 100_000


def test_ranks_together_do_the_work_of_one_device() -> None:
    alone = cost.phase1(SHAPE, BlockPlan.resolve(100, 16), tokens_per_forward=16)
    plan = BlockPlan.resolve(100, 16, ranks=3)
    assert cost.phase1(SHAPE, plan, tokens_per_forward=16) == alone
    assert (
        sum(cost.phase1(SHAPE, plan, tokens_per_forward=16, rank=r).total for r in range(3))
        == alone.total
    )


def test_one_block_costs_what_dense_attention_costs() -> None:
    dense = cost.phase1(SHAPE, BlockPlan.dense(50), tokens_per_forward=16)
    assert cost.phase1(SHAPE, BlockPlan.resolve(50, 64), tokens_per_forward=16) == dense
    assert cost.phase1_official(SHAPE, BlockPlan.resolve(50, 64)) == dense


def test_the_official_scheme_doubles_linear_work_and_adds_a_third_of_attention() -> None:
    """This holds for anchor = block, in the limit of many blocks."""
    full = ModelShape(**(vars(SHAPE) | {"attention": SHAPE.attention[:1]}))
    plan = BlockPlan.resolve(64 * 1024, 64)
    star = cost.phase1(full, plan, tokens_per_forward=1024)
    official = cost.phase1_official(full, plan)
    assert official.linear / star.linear == pytest.approx(2, rel=0.01)
    assert official.attention / star.attention == pytest.approx(4 / 3, rel=0.01)


def test_phase_2_counts_each_forward_once() -> None:
    """The last answer token is not fed back; the head runs for answer tokens only."""
    flops = cost.phase2(SHAPE, 40, query_tokens=5, answer_tokens=3, queries=2)
    assert flops.linear == 2 * 2 * 1000 * (5 + 2)
    assert flops.head == 2 * 2 * 77 * 3
    seen = {window: 0 for window in (None, 9)}
    for token in range(40, 47):
        seen[None] += token + 1
        seen[9] += 9
    assert flops.attention == 2 * 2 * 6 * (5 + 4) * (seen[None] + seen[9])


def test_mla_expands_the_keys_that_a_forward_reads() -> None:
    shape = ModelShape(**(vars(SHAPE) | {"expansion_parameters": 10}))
    plan = BlockPlan(context_tokens=40, block_size=16, anchor_size=4)
    # Forwards of 8 tokens: 0..8, 8..16 with 8 before, then blocks with the anchor: 8 + 4, 16 + 4,
    # and the last block 8 + 4.
    keys = 8 + 16 + 12 + 20 + 12
    assert cost.phase1(shape, plan, tokens_per_forward=8).expansion == 2 * 10 * keys
    assert cost.phase2(shape, 40, query_tokens=5, answer_tokens=3).expansion == 2 * 10 * (
        45 + 46 + 47
    )
    memory = cost.memory_per_rank(shape, plan, tokens_per_forward=8, kv_windows="all")
    assert memory.working == stored.working_bytes(shape, 8) + 40 * 3 * (5 + 4) * 2


# ------------------------------------------------------------------ memory


def test_memory_of_every_rank() -> None:
    # One block, one block, and one with the short last block.
    plan = BlockPlan(context_tokens=50, block_size=16, anchor_size=7, ranks=3)
    sizes: dict[str, Any] = dict(tokens_per_forward=16, tail_tokens=11, kv_windows="all")
    first, middle, last = (
        cost.memory_per_rank(SHAPE, plan, rank=rank, **sizes) for rank in range(3)
    )
    token = SHAPE.kv_bytes_per_token
    assert token == 2 * 54
    assert [memory.kv for memory in (first, middle, last)] == [16 * token, 16 * token, 18 * token]
    assert [memory.anchor for memory in (first, middle, last)] == [0, 7 * token, 7 * token]
    assert [memory.tail for memory in (first, middle, last)] == [0, 0, 11 * token]
    assert first.weights == last.weights == 2600
    assert last.working == first.working == stored.working_bytes(SHAPE, 16)
    assert first.total == 2600 + first.kv + first.working


def test_a_rank_without_blocks_holds_weights_only() -> None:
    plan = BlockPlan(context_tokens=10, block_size=16, anchor_size=7, ranks=2)
    assert (
        cost.memory_per_rank(SHAPE, plan, tokens_per_forward=16, rank=1).total == SHAPE.weight_bytes
    )


# ------------------------------------------------------------------ shapes of real models


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama_mqa",
        "gpt2",
        "gemma3n",
        "deepseek_v3",
        "gpt_oss",
        "mimo_v2_flash",
        "phi3_longrope",
    ],
)
def test_kv_bytes_equal_those_of_an_encoded_context(name: str) -> None:
    """GQA, MQA, fused projections, KV sharing, MLA, and heads that differ between layers."""
    shape = model_shape(FAMILIES[name]())
    star = engine(name, block_size=16, anchor_size=7, kv_windows="all")
    context = star.encode(ids(50))
    assert 50 * shape.kv_bytes_per_token == context.nbytes
    assert shape.parameters == sum(parameter.numel() for parameter in tiny(name).parameters())
    assert shape.weight_bytes == 4 * shape.parameters


def test_linear_parameters_of_a_dense_model_are_its_matrices() -> None:
    shape = model_shape(FAMILIES["llama"]())
    matrices = sum(p.numel() for p in tiny("llama").model.layers.parameters() if p.dim() == 2)
    # Older releases of transformers also compute rotary angles with a tiny matrix product.
    assert matrices <= shape.linear_parameters <= matrices + 8
    assert shape.head_parameters == tiny("llama").lm_head.weight.numel()
    assert [call.window for call in shape.attention] == [None] * 3
    assert shape.attention[0] == AttentionShape(heads=6, kv_heads=3, k_head_size=16, v_head_size=16)


def test_only_experts_that_a_token_is_routed_to_count() -> None:
    shape = model_shape(FAMILIES["mixtral"]())
    layers = tiny("mixtral").model.layers
    others = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    experts = sum(p.numel() for p in layers.parameters() if p.dim() == 3)
    active = others + experts * 2 // 5
    assert active <= shape.linear_parameters <= active + 8


def test_mla_is_recognized() -> None:
    shape = model_shape(FAMILIES["deepseek_v3"]())
    assert shape.kv_elements_per_token == 3 * (20 + 8)
    assert shape.attention[0] == AttentionShape(
        heads=6, kv_heads=6, k_head_size=24, v_head_size=12, compressed_size=20, rotary_size=8
    )
    expansion = sum(
        p.numel() for n, p in tiny("deepseek_v3").named_parameters() if "kv_b_proj" in n
    )
    assert shape.expansion_parameters == expansion


def test_windows_are_those_of_the_layers() -> None:
    assert [call.window for call in model_shape(FAMILIES["gemma3n"]()).attention] == [
        20,
        None,
        20,
        None,
    ]


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("bfloat16", 2), ("float32", 4)])
def test_precision(dtype: str, size: int) -> None:
    assert model_shape(FAMILIES["llama"](), dtype).bytes_per_element == size


def test_the_precision_defaults_to_the_configs() -> None:
    assert model_shape(AutoConfig.from_pretrained(BUNDLED)).bytes_per_element == 2


def test_the_config_is_not_modified() -> None:
    """Building a model writes to its config; a shape must not."""
    config = FAMILIES["gpt2"]()
    before = config.to_dict()
    model_shape(config)
    assert config.to_dict() == before


def test_unsupported_models_have_no_cost() -> None:
    with pytest.raises(UnsupportedModelError, match="mamba"):
        model_shape(REFUSED["mamba"]())


def test_models_that_read_values_are_refused_by_name() -> None:
    with pytest.raises(
        InvalidInputError, match="the cost of jetmoe cannot be derived from its config"
    ):
        model_shape(UNUSUAL["jetmoe"]())


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="dtype 'float23' is unknown; use auto"):
        model_shape(FAMILIES["llama"](), "float23")


def test_layers_may_differ_in_their_kv_heads() -> None:
    """Gemma 4 has full-attention layers with KV heads of their own: there is no single value."""
    plain = FAMILIES["gemma4"]().get_text_config(decoder=True)
    if not hasattr(plain, "per_layer_config"):
        pytest.skip("this release of transformers has one value for all layers")
    config = plain.to_dict()
    config.pop("per_layer_config", None)
    mixed = AutoConfig.for_model(
        **(config | dict(attention_k_eq_v=True, num_global_key_value_heads=2))
    )
    assert model_shape(mixed, "float32").kv_elements_per_token > 0
    assert any("num_key_value_heads 3" in reason for reason in tensor_parallel.reasons(mixed, 2))
    assert any("num_key_value_heads 2" in reason for reason in tensor_parallel.reasons(mixed, 3))


@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes"),
    [
        # Llama-3.1-8B and DeepSeek-V3 (671B) as published; transformers does not count router
        # biases as parameters. They store 32 x 2 x 8 x 128 and 61 x (512 + 64) elements per token.
        (
            dict(
                model_type="llama",
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            ),
            8_030_261_248,
            131_072,
        ),
        (dict(model_type="deepseek_v3", num_nextn_predict_layers=0), 671_026_404_352, 70_272),
    ],
    ids=["llama-3.1-8b", "deepseek-v3"],
)
def test_large_models_take_no_memory_and_little_time(
    config: dict[str, Any], parameters: int, kv_bytes: int
) -> None:
    shape = model_shape(AutoConfig.for_model(**config), "bfloat16")
    assert shape.parameters == parameters
    assert shape.kv_bytes_per_token == kv_bytes
    if config["model_type"] == "deepseek_v3":
        active = shape.linear_parameters + shape.expansion_parameters + shape.head_parameters
        assert active / 1e9 == pytest.approx(37, rel=0.02)  # "37B activated", as published


def test_the_cost_model_needs_the_standard_library_only(tmp_path: Path) -> None:
    code = "import sys, json, star_attention.planning.cost; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stdout))


@pytest.mark.parametrize("name", ["llama", "gemma3n", "deepseek_v3"])
def test_other_kv_formats_and_devices_take_the_predicted_memory(name: str) -> None:
    """The bytes of fp8 KV of different sizes, and none on the device for KV in host memory."""
    shape = model_shape(tiny(name).config, "float32")
    star = engine(name, block_size=24, anchor_size=10, tokens_per_forward=48, kv_dtype="fp8")
    context = star.encode(ids(96))
    assert stored.context_bytes(shape, 96, "fp8") == context.nbytes
    plan = context.plan
    memory = cost.memory_per_rank(shape, plan, tokens_per_forward=48, kv_dtype="fp8")
    assert (memory.kv, memory.host) == (context.nbytes, 0)
    assert memory.anchor == 10 * shape.kv_bytes_per_token
    offloaded = cost.memory_per_rank(
        shape, plan, tokens_per_forward=48, kv_dtype="fp8", kv_device="cpu"
    )
    assert (offloaded.kv, offloaded.host) == (0, context.nbytes)
    # Buffers are as large as the largest layer, whatever windows keep.
    arriving = min(3, shape.kv_layers) * 96 * shape.stored_bytes_per_token("fp8")
    arriving += 96 * shape.kv_bytes_per_token
    assert offloaded.working - memory.working == arriving // shape.kv_layers
    assert cost.memory_per_rank(shape, plan, tokens_per_forward=48).anchor == 0


def test_a_second_look_is_a_query_and_the_chosen_tokens_again() -> None:
    """Chosen tokens see all tokens before them: those of a share of 1 are a dense encoding."""
    sizes: dict[str, Any] = dict(tokens_per_forward=16, query_tokens=5)
    query = cost.phase2(SHAPE, 40, query_tokens=5, answer_tokens=1)
    dense = cost.phase1(SHAPE, BlockPlan.dense(40), tokens_per_forward=16)
    scores = 2 * 6 * 5 * sum(40 + i + 1 + 9 for i in range(5))
    paper = BlockPlan(context_tokens=40, block_size=16, anchor_size=7)
    whole = cost.second_look(SHAPE, paper, 1, **sizes, queries=2)
    assert whole.linear == 2 * (query.linear + dense.linear)
    assert whole.attention == 2 * (query.attention + scores + dense.attention)
    assert whole.head == 0
    tenth = cost.second_look(SHAPE, paper, 0.1, **sizes)
    assert tenth.linear == query.linear + dense.linear // 10
    assert cost.second_look(SHAPE, paper, 0, **sizes) == cost.Flops()
    shape = ModelShape(**(vars(SHAPE) | {"expansion_parameters": 10}))
    assert cost.second_look(shape, paper, 0.5, **sizes).expansion == 2 * 10 * (45 + 2 * 40)
    plan = BlockPlan(context_tokens=50, block_size=16, anchor_size=7, ranks=3)
    for place, twice in (({}, "copy"), (dict(kv_device="cpu"), "host")):
        once, more = (
            cost.memory_per_rank(
                SHAPE, plan, tokens_per_forward=8, rank=1, looks_twice=looks_twice, **place
            )
            for looks_twice in (False, True)
        )
        stored = once.kv or once.host
        assert getattr(more, twice) - getattr(once, twice) == stored > 0
        assert more.total - once.total == (stored if twice == "copy" else 0)
