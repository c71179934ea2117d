"""Linear layers in fp8 on a GPU: products, kernels, CUDA graphs, compiled layers and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from star_attention import StarLLM
from star_attention.hf.loading import fp8 as loading
from star_attention.linear import fp8
from star_attention.linear.fp8 import Fp8Linear
from tests.needles import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU that multiplies fp8",
    ),
]
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"

SHAPES = [(6144, 4096), (4096, 14336), (1024, 4096), (4096, 2048), (48, 80), (96, 1040)]
"""Outputs and inputs of layers of an 8B model, of its slices, and odd ones."""


def layer_of(N: int, K: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(K, N, bias=bias, device="cuda", dtype=dtype)
    Fp8Linear.convert(layer)
    assert layer.has_kernels  # type: ignore[union-attr]
    return layer


def values(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.double() * layer.scale.double()[:, None]
    return weight


def close(out: Tensor, exact: Tensor) -> None:
    """Check a result against one in float64: the error of rounding it once, twice over."""
    assert out.isfinite().all()
    error = (out.double() - exact).norm() / exact.norm()
    assert error <= 2 * torch.finfo(out.dtype).eps, float(error)


# ------------------------------------------------------------------------------- products


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [65, 300, 4096])
def test_many_tokens(shape: tuple[int, int], tokens: int) -> None:
    """torch._scaled_mm multiplies what quantizing says, in bf16 sums of its own."""
    layer = layer_of(*shape)
    x = torch.randn(1, tokens, shape[1], device="cuda", dtype=torch.bfloat16)
    q, scale = fp8.quantize(x)
    close(layer(x), linear(q.double() * scale.double(), values(layer)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 32, 64, 100, 256, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_tokens(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    layer = layer_of(*shape, dtype=dtype)
    x = torch.randn(rows, 1, shape[1], device="cuda", dtype=dtype)
    close(layer(x), linear(x.double(), values(layer)))


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_float32_has_the_same_numbers(tokens: int) -> None:
    layer = layer_of(96, 1040, dtype=torch.float32)
    x = torch.randn(1, tokens, 1040, device="cuda")
    on_cpu = Fp8Linear(1040, 96, bias=False)
    on_cpu.weight = nn.Parameter(layer.weight.cpu(), requires_grad=False)
    on_cpu.scale, on_cpu.has_kernels = layer.scale.cpu(), False
    torch.testing.assert_close(layer(x).cpu(), on_cpu(x.cpu()), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
def test_biases_and_parts(tokens: int) -> None:
    layer = layer_of(4096, 2048, bias=True)
    x = torch.randn(1, tokens, 1024, device="cuda", dtype=torch.bfloat16)
    rows, columns = slice(512, 1024), slice(1024, 2048)
    out = fp8.linear(
        x, layer.weight[rows, columns], layer.scale[rows], layer.bias[rows], kernels=True
    )
    seen = x.double()
    if tokens > fp8.FEW:
        q, scale = fp8.quantize(x)
        seen = q.double() * scale.double()
    close(out, linear(seen, values(layer)[rows, columns], layer.bias[rows].double()))


def test_weights_are_quantized_as_on_the_cpu() -> None:
    """Identities are of bits, wherever a model was quantized."""
    torch.manual_seed(0)
    weight = torch.randn(512, 1040).bfloat16()
    (q, scale), (q_cuda, scale_cuda) = fp8.quantize(weight), fp8.quantize(weight.cuda())
    assert torch.equal(q.view(torch.uint8), q_cuda.cpu().view(torch.uint8))
    assert torch.equal(scale, scale_cuda.cpu())


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_in_a_cuda_graph(rows: int) -> None:
    """Chained launches see what the one before wrote, also those that start early."""
    first, second = layer_of(2048, 1024), layer_of(1024, 2048)
    x = torch.randn(rows, 1, 1024, device="cuda", dtype=torch.bfloat16)

    def work() -> Tensor:
        y = x
        for _ in range(10):
            y = second(first(y)) + x
        return y

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        expected = work()
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


# -------------------------------------------------------------------------- whole models


def load(weights: str | None = "fp8", **settings: Any) -> StarLLM:
    defaults = dict(dtype="bfloat16", block_size=1024, device="cuda")
    return StarLLM.from_pretrained(MODEL, weights=weights, **(defaults | settings))


def answer(star: StarLLM, seed: int) -> tuple[str, str, Tensor]:
    """Return the right answer to a needle, the model's, and teacher-forced logits of both."""
    sample = make("niah_multikey", star.tokenizer, 4096, seed=seed)
    fact = sample.facts[seed]
    context = star.encode(sample.context)
    reply = star.generate(context, fact.query, max_new_tokens=12)
    query = star.tokenizer(f"{fact.query} {fact.value}", add_special_tokens=False).input_ids
    logits = star.logits(context, torch.tensor(query))
    assert logits is not None
    return fact.value, reply.text.strip(), logits.cpu()


@pytest.mark.parametrize(
    "settings",
    [
        dict(compile=True),
        dict(compile=False),
        dict(compile=True, kv_dtype="fp8"),
        dict(compile=True, lookback=1),
    ],
)
def test_needles_and_logits(settings: dict[str, Any]) -> None:
    plain, star = load(None, **settings), load(**settings)
    for seed in range(4):
        value, right, exact = answer(plain, seed)
        _, text, quick = answer(star, seed)
        error = float((quick - exact).norm() / exact.norm())
        print(f"{settings} {seed}: {value} {right} {text}, logits {error:.4f}")
        assert text == right
        assert error <= 0.02
    if settings["compile"]:
        assert star.runtime.handle.compiled.whole
        captured = star.runtime.handle.graphs.captured
        assert captured
        assert all(captured.values())
        assert not star.runtime.handle.graphs.recorder.broken


def test_rows_in_one_step() -> None:
    """A batch's answers, whose steps have several rows, are those of one query after another."""
    star = load(compile=True)
    sample = make("niah_multikey", star.tokenizer, 4096, seed=0)
    context = star.encode(sample.context)
    queries = [fact.query for fact in sample.facts]
    together = star.generate(context, queries, max_new_tokens=10)
    right = sum(
        reply.text.strip() == fact.value for reply, fact in zip(together, sample.facts, strict=True)
    )
    alone = [star.generate(context, query, max_new_tokens=10) for query in queries]
    same = sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
    print(f"{right} of {len(queries)} right, {same} as alone")
    assert right >= 0.8 * len(queries)
    assert same >= 0.9 * len(queries)


def test_loading_holds_one_plain_layer_at_a_time() -> None:
    """The peak is that of the model in fp8, and of one layer that is being quantized."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, vocab_size=1024
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    plain_bytes = sum(weight.nbytes for weight in model.parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loading.quantize(model, loading.layers(model), "cuda")
    model.to("cuda")
    held, peak = (
        each - before for each in (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    )
    largest = 8192 * 2048
    # Two of the eight layers stay plain.
    assert held < 0.7 * plain_bytes
    # bf16, two copies in fp32 and their results.
    assert peak < held + 20 * largest
