"""Every model family through the engine: the law against the oracle, one block against stock."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from star_attention import StarLLM
from star_attention.attention import kernels
from star_attention.planning.lookback import layer_numbers
from tests.engines import CONTEXT, QUERY, VARIED, engine, ids, stock_generate, stored, tiny
from tests.families import FAMILIES, UNUSUAL
from tests.family_configs import WINDOW
from tests.model_oracle import oracle_forward
from tests.tiers import in_turn

STEPS = 4
# (block_size, anchor_size, tokens_per_forward): several whole blocks a forward, then pieces of one.
# The last block is ragged.
GEOMETRIES = [(16, 16, 40), (24, 10, 9)]
# (lookback, lookback_layers): the paper's method, then forwards that hold more and fewer blocks
# than they look back.
LOOKBACKS = [(0, "all"), (1, "lower"), (3, "all")]

TOLERANCE = 1e-4
# These two do not scale their scores (attention_multiplier is 1, not head_size ** -0.5 = 1/4), and
# a sharper softmax amplifies rounding. The stock forward in float32 differs by up to 1.7e-4 from
# its run in float64; the budget is about twice that.
TOLERANCES = {"granitemoe": 4e-4, "granite_swa": 4e-4}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCES.get(name, TOLERANCE), rtol=0)


# Families that vary meet every pair of a geometry and a look-back, the others both geometries.
@pytest.mark.parametrize(
    (
        "name",
        "block_size",
        "anchor_size",
        "tokens_per_forward",
        "lookback",
        "lookback_layers",
    ),
    in_turn(3, [*FAMILIES, *UNUSUAL], GEOMETRIES, LOOKBACKS, quick=lambda name, *_: name in VARIED),
)
def test_engine_equals_the_explicit_mask(
    name: str,
    block_size: int,
    anchor_size: int,
    tokens_per_forward: int,
    lookback: int,
    lookback_layers: str,
) -> None:
    """Keys and values, query logits and greedy answers are those of the law as one mask."""
    star = engine(
        name,
        block_size=block_size,
        anchor_size=anchor_size,
        tokens_per_forward=tokens_per_forward,
        lookback=lookback,
        lookback_layers=lookback_layers,
    )
    context_ids, query_ids = ids(CONTEXT), ids(QUERY, seed=2)

    context = star.encode(context_ids)
    query_QV = star.logits(context, query_ids)
    reply = star.generate(
        context, query_ids, max_new_tokens=STEPS, ignore_eos=True, return_logits=True
    )

    oracle = oracle_forward(
        tiny(name),
        torch.tensor([context_ids + query_ids + reply.token_ids]),
        context_len=CONTEXT,
        block_size=block_size,
        anchor_size=anchor_size,
        lookback=lookback,
        # LongCat's layers have two attentions each, which count as two.
        lookback_layers=layer_numbers(lookback_layers, len(context.kv.layers)) if lookback else (),
        rope_length=context.rope_length,
    )
    for layer, oracle_layer in zip(stored(context), oracle.kv, strict=True):
        for actual_1GLD, right_1GLD in zip(layer, oracle_layer, strict=True):
            # Of a layer with a window, the last one is kept.
            first = CONTEXT - actual_1GLD.shape[2]
            assert first in (0, CONTEXT - WINDOW + 1)
            assert_close(name, actual_1GLD, right_1GLD[:, :, first:CONTEXT])
    assert_close(name, query_QV, oracle.logits_BLV[0, CONTEXT : CONTEXT + QUERY])
    answer_TV = oracle.logits_BLV[0, CONTEXT + QUERY - 1 : -1]
    assert_close(name, reply.logits, answer_TV)
    assert reply.token_ids == answer_TV.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {"method": "dense"}) for name in [*FAMILIES, *UNUSUAL]]
    + [(name, {"block_size": 128}) for name in VARIED],
)
def test_one_block_is_the_stock_model(name: str, settings: dict[str, object]) -> None:
    """Law 1: one block answers token for token like stock `generate` with equal frequencies."""
    star = engine(name, tokens_per_forward=40, **settings)
    context_ids, query_ids = ids(CONTEXT), ids(QUERY, seed=2)

    context = star.encode(context_ids)
    reply = star.generate(
        context, query_ids, max_new_tokens=STEPS, ignore_eos=True, return_logits=True
    )

    assert context.plan.is_dense
    [stock], stock_1TV = stock_generate(
        tiny(name),
        context_ids + query_ids,
        rope_length=context.rope_length,
        max_new_tokens=STEPS,
        do_sample=False,
    )
    assert reply.token_ids == stock
    assert_close(name, reply.logits, stock_1TV[0])


@pytest.fixture
def matrix_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by plain matrix products alone, which are otherwise the last choice."""
    # Not by deleting the others: putting them back would change the order of preference.
    monkeypatch.setattr(kernels, "KERNELS", {"math": kernels.KERNELS["math"]})


@pytest.mark.usefixtures("matrix_products_only")
@pytest.mark.parametrize("name", VARIED)
def test_plain_matrix_products_obey_the_laws_too(name: str) -> None:
    for geometry, lookback in zip(GEOMETRIES, LOOKBACKS, strict=False):
        test_engine_equals_the_explicit_mask(name, *geometry, *lookback)
    test_one_block_is_the_stock_model(name, {"block_size": 128})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIED)
def test_half_precision_is_as_exact_as_a_plain_implementation(
    name: str, dtype: torch.dtype
) -> None:
    """Teacher-forced logits have at most twice the error of a plain masked forward."""
    half = copy.deepcopy(tiny(name)).to(dtype)
    star = StarLLM(half, block_size=24, anchor_size=10, tokens_per_forward=30)
    context_ids, query_ids = ids(CONTEXT), ids(QUERY, seed=2)
    context = star.encode(context_ids)
    ours_QV = star.logits(context, query_ids).float()

    def oracle(model: PreTrainedModel) -> torch.Tensor:
        logits_BLV = oracle_forward(
            model,
            torch.tensor([context_ids + query_ids]),
            context_len=CONTEXT,
            block_size=24,
            anchor_size=10,
            rope_length=context.rope_length,
        ).logits_BLV
        return logits_BLV[0, CONTEXT:].float()

    exact_QV, plain_QV = oracle(tiny(name)), oracle(half)
    ours, plain = (
        float((logits - exact_QV).norm() / exact_QV.norm()) for logits in (ours_QV, plain_QV)
    )
    assert 0 < ours <= 2 * plain


@pytest.mark.parametrize("name", [*FAMILIES, *UNUSUAL])
def test_every_context_token_goes_through_each_layer_once(name: str) -> None:
    """Law 4: blocks share the anchor. The official code encodes it once more with each block."""
    model = tiny(name)
    layers = (
        model.get_decoder().layers
        if hasattr(model.get_decoder(), "layers")
        else model.get_decoder().h
    )
    rows: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        rows[module] += hidden.shape[-3:-1].numel()

    star = StarLLM(model, block_size=24, anchor_size=10, tokens_per_forward=30)
    shapes = star.runtime.handle.layer_shapes
    handles = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        star.encode(ids(CONTEXT))
    finally:
        for handle in handles:
            handle.remove()
    # Gemma 3n's last layers read the keys of others, and encoding leaves them out.
    shared = sum(shape is None for shape in shapes)
    expected = [CONTEXT] * (len(layers) - shared) + [0] * shared
    assert [rows[layer] for layer in layers] == expected


@pytest.mark.parametrize(
    "name", ["llama", "phi3", "gemma3", "nemotron", "gpt_oss", "gemma3n", "stablelm", "jetmoe"]
)
def test_every_context_token_goes_through_each_linear_layer_as_in_a_plain_forward(
    name: str,
) -> None:
    """The same for each linear layer; the vocabulary's sees no token, since phase 1 needs none."""
    model = tiny(name)
    star = StarLLM(model, block_size=16, anchor_size=16, tokens_per_forward=40)

    encoded = _rows_by_linear(model, lambda: star.encode(ids(CONTEXT)))
    with torch.no_grad():
        plain = _rows_by_linear(model, lambda: model(torch.tensor([ids(CONTEXT)]), use_cache=False))

    assert plain.pop("lm_head") == CONTEXT
    assert encoded == plain
    assert len(encoded) >= 2 * model.config.num_hidden_layers


def _rows_by_linear(model: PreTrainedModel, run: Callable[[], object]) -> Counter[str]:
    rows: Counter[str] = Counter()

    def count(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            rows[path] += output.numel() // output.shape[-1]

        return hook

    handles = [
        module.register_forward_hook(count(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return rows
