"""Linear layers in fp8: their arithmetic, loading, identity, files, plans and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

from star_attention import StarLLM, phase1
from star_attention.errors import (
    InvalidInputError,
    UnsupportedModelError,
)
from star_attention.hf.execution import compiled
from star_attention.hf.loading import fp8 as loading
from star_attention.linear import fp8
from star_attention.linear.fp8 import Fp8Linear
from tests.compiling import fresh_code
from tests.dist.checks import answer_with, check_model
from tests.engines import BUNDLED, bundled_tokenizer, ids, tiny
from tests.families import build
from tests.fp8_models import SIZES, dequantized, plain, quantized
from tests.needles import make
from tests.refusals import refused

HALF_STEP = 2.0**-4
"""Largest relative error of a number that is rounded to the three bits of e4m3."""


def load(path: Any = BUNDLED, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(path, **(dict(weights="fp8", device="cpu") | settings))


# ---------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_quantizing_rounds_to_the_nearest_number(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    x_MK = (torch.randn(7, 96) * size).to(dtype)
    q_MK, scale_M1 = fp8.quantize(x_MK)
    assert q_MK.dtype == torch.float8_e4m3fn
    assert q_MK.shape == x_MK.shape
    assert scale_M1.shape == (7, 1)
    assert scale_M1.dtype == torch.float32
    x_MK, back_MK = x_MK.float(), q_MK.float() * scale_M1
    assert torch.equal(q_MK.float().abs().amax(-1), torch.full((7,), 448.0))
    # Numbers below 2^-6 of the scale have a step of 2^-9.
    budget_MK = torch.maximum(HALF_STEP * x_MK.abs(), 2.0**-10 * scale_M1)
    assert ((back_MK - x_MK).abs() <= budget_MK * (1 + 1e-5)).all()


def test_rows_of_zeros_stay_zeros() -> None:
    q_MK, scale_M1 = fp8.quantize(torch.zeros(2, 16))
    assert not q_MK.float().any()
    assert scale_M1.isfinite().all()
    assert (scale_M1 > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    x_MK = torch.ones(2, 16)
    x_MK[1, 3] = value
    q_MK, scale_M1 = fp8.quantize(x_MK)
    back_MK = q_MK.float() * scale_M1
    assert back_MK[0].isfinite().all()
    assert not back_MK[1, 3].isfinite()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 200])
def test_a_layer_is_the_product_of_its_numbers(tokens: int, bias: bool) -> None:
    """Up to 64 tokens activations are exact; beyond, they are those of fp8."""
    torch.manual_seed(0)
    layer = nn.Linear(80, 48, bias=bias)
    exact_NK = layer.weight.detach().clone()
    Fp8Linear.convert(layer)
    x = torch.randn(3, tokens, 80)
    q, scale = fp8.quantize(x)
    seen = x if tokens <= 64 else q.float() * scale
    expected = nn.functional.linear(seen, dequantized(layer), layer.bias)
    out = layer(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    plain_out = nn.functional.linear(x, exact_NK, layer.bias)
    error = (out - plain_out).norm() / plain_out.norm()
    assert 0.005 < error < 0.05


def test_rows_of_a_batch_are_multiplied_as_by_themselves() -> None:
    """What is quantized depends on the tokens of a row, not on how many rows there are."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    Fp8Linear.convert(layer)
    for tokens in (5, 64, 70):
        x = torch.randn(40, tokens, 64)
        torch.testing.assert_close(layer(x)[3:4], layer(x[3:4]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    """Sums of numbers up to 448 are beyond fp16."""
    layer = nn.Linear(4096, 16, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    layer.to(dtype)
    Fp8Linear.convert(layer)
    for tokens in (1, 65):
        out = layer(torch.ones(1, tokens, 4096, dtype=dtype))
        assert out.dtype == dtype
        assert torch.equal(out, torch.full_like(out, 4096.0))


def test_moving_a_model_keeps_the_numbers() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    Fp8Linear.convert(layer)
    weight, scale = layer.weight.clone(), layer.scale.clone()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == weight.dtype
    assert half.scale.dtype == torch.float32
    assert torch.equal(half.weight.float(), weight.float())
    assert torch.equal(half.scale, scale)
    assert half.bias.dtype == torch.bfloat16
    assert half(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16


def test_activations_in_fp8_are_refused() -> None:
    """A family that converts activations to its weights' precision would lose their scale."""
    layer = nn.Linear(32, 16)
    Fp8Linear.convert(layer)
    x = torch.ones(2, 32)
    refused(InvalidInputError, "without weights", call=lambda: layer(x.to(layer.weight.dtype)))


def test_compiled_layers_quantize_an_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value of a layer share it, and so do both halves of its MLP."""
    counts: list[int] = []

    def counted(graph: torch.fx.Graph) -> None:
        fp8.share_quantizing(graph)
        op = torch.ops.aten.amax.default
        counts.append(len(list(graph.find_nodes(op="call_function", target=op))))

    monkeypatch.setattr(compiled, "_SHARE_QUANTIZING", compiled._Passes("counted", counted))
    monkeypatch.setattr(phase1, "_WORTH_COMPILING", 1)
    model = quantized("llama")
    sizes: dict[str, Any] = dict(block_size=128, tokens_per_forward=128)
    with fresh_code():
        contexts = [
            StarLLM(model, compile=compile, **sizes).encode(ids(256)) for compile in (True, False)
        ]
    # None in the first layer, and before q, k, v; o; gate, up; down.
    assert set(counts) == {0, 4}
    for fast, slow in zip(*(context.kv.layers for context in contexts), strict=True):
        for a, b in zip(fast.stored(), slow.stored(), strict=True):
            # A number in between two of e4m3 may be rounded to either.
            assert (a - b).norm() < 0.03 * b.norm()


# ------------------------------------------------------------------------------------ families


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("mixtral", {}),
        ("olmo2", {}),
        ("llama", dict(lookback=1)),
        ("llama", dict(compile=True)),
    ],
)
def test_answers_are_those_of_plain_weights_of_the_same_values(
    name: str, settings: dict[str, Any]
) -> None:
    sizes: dict[str, Any] = dict(block_size=24, anchor_size=10)
    star = StarLLM(quantized(name), tokens_per_forward=48, **sizes, **settings)
    lookback = settings.get("lookback", 0)
    layers = range(len(star.runtime.handle.windows)) if lookback else ()
    check_model(
        [answer_with(star)], plain(name), lookback=lookback, lookback_layers=layers, **sizes
    )


def test_what_stays_as_it_is() -> None:
    model = quantized("qwen3_moe")
    names = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    # Neither the first nor the last of three layers.
    assert sorted(names) == [f"model.layers.1.self_attn.{kind}_proj" for kind in "koqv"]
    assert model.get_output_embeddings().weight.dtype == torch.float32
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == torch.float32
    latent = [name for name, _ in loading.layers(tiny("deepseek_v3"))]
    assert latent
    assert not any("kv_b_proj" in name or ".gate." in name for name in latent)


def test_layers_of_odd_sizes_stay_as_they_are() -> None:
    """`torch._scaled_mm` takes sizes in steps of 16."""
    model = quantized("llama", **SIZES | dict(num_key_value_heads=1, head_dim=24))
    attention = model.model.layers[1].self_attn
    assert type(attention.k_proj) is nn.Linear
    assert type(attention.o_proj) is Fp8Linear


@pytest.mark.parametrize(("name", "sizes"), [("gpt2", {}), ("llama", dict(num_hidden_layers=2))])
def test_a_model_without_such_layers_is_refused(name: str, sizes: dict[str, Any]) -> None:
    model = build(name, **sizes)
    refused(
        UnsupportedModelError,
        "no plain linear layers",
        call=lambda: loading.quantize(model, loading.layers(model), None),
    )


# --------------------------------------------------------------------------- the bundled model


@pytest.mark.parametrize(
    "task",
    [
        "niah_multikey",
        *(pytest.param(f"niah_single_{of}", marks=pytest.mark.slow) for of in ("noise", "code")),
    ],
)
def test_needles_and_logits_of_the_bundled_model(task: str) -> None:
    """Answers are those of plain weights. Teacher-forced logits of question and answer differ by
    less than 1 %: the 2-norm of their difference, over all tokens and the vocabulary, to theirs."""
    engines = [load(weights=weights, dtype="float32", block_size=256) for weights in (None, "fp8")]
    sample = make(task, bundled_tokenizer(), 1024, seed=0)
    fact = sample.facts[len(sample.facts) // 2]
    contexts = [star.encode(sample.context) for star in engines]
    answers = [
        star.generate(context, fact.query, max_new_tokens=12)
        for star, context in zip(engines, contexts, strict=True)
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].text.strip() == fact.value
    query = bundled_tokenizer()(fact.query, add_special_tokens=False).input_ids
    tokens = torch.tensor(query + answers[0].token_ids)
    exact, quick = (
        star.logits(context, tokens) for star, context in zip(engines, contexts, strict=True)
    )
    assert exact is not None
    assert quick is not None
    error = (quick - exact).norm() / exact.norm()
    assert 0.002 < error <= 0.01, "1.1 % with the first and last layer in fp8"


def test_with_contexts_in_fp8() -> None:
    star = load(dtype="float32", block_size=256, kv_dtype="fp8")
    sample = make("niah_single_noise", bundled_tokenizer(), 1024, seed=0)
    reply = star.generate(star.encode(sample.context), sample.facts[0].query, max_new_tokens=12)
    assert reply.text.strip() == sample.facts[0].value
