"""Gates, residuals and norms in the launches of a row or a few on a GPU, against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from star_attention import StarLLM
from star_attention.linear import fp8
from star_attention.linear.triton_experts import ACTIVATIONS
from tests.needles import make
from tests.row_norms import PARTS, check, norms_of

few_folded = pytest.importorskip("star_attention.linear.triton_few_folded")
triton_folded = pytest.importorskip("star_attention.linear.triton_folded")
if TYPE_CHECKING:
    from star_attention.linear.triton_norm import RowNorms

triton_norm = pytest.importorskip("star_attention.linear.triton_norm")

pytestmark = pytest.mark.gpu

MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
# Columns, and rows of each matrix: whole tiles of each kind, and cut ones.
SHAPES = [(4096, 1024), (4096, 3000), (4096, 6000), (2560, 3000), (1000, 37)]


def weight_of(
    N: int, K: int, kind: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return a weight, its scales or None, and its values."""
    weight = torch.randn(N, K, device="cuda") * K**-0.5
    if kind == "fp8":
        q, scale = fp8.quantize(weight)
        return q, scale[:, 0].contiguous(), q.double() * scale.double()
    weight = weight.to(dtype)
    return weight, None, weight.double()


def graphed(work: Callable[..., Tensor], *args: object) -> Tensor:
    """Return what the second replay of a CUDA graph with three launches of the work leaves."""
    work(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out = work(*args)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return out


def close(out: Tensor, exact: Tensor) -> None:
    """Check a result against one in float64: rounded once, or as near as sums in float32 are."""
    eps = max(torch.finfo(out.dtype).eps, 1e-6)
    assert (out.double() - exact).norm() <= eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gates(dtype: torch.dtype, kind: str, shape: tuple[int, int], activation: str) -> None:
    torch.manual_seed(0)
    K, N = shape
    x = torch.randn(1, 1, K, device="cuda").to(dtype) * 3
    made = [weight_of(N, K, kind, dtype) for _ in range(2)]
    bias = torch.randn(N, device="cuda").to(dtype)
    out = graphed(
        triton_folded.folded_linears,
        x, [made[0][0], made[1][0]], [None, bias], [0, N, 0] * 2, [made[0][1], made[1][1]],
        None, activation,
    )  # fmt: skip
    up = linear(x.double(), made[1][2], bias.double())
    close(out, ACTIVATIONS[activation](linear(x.double(), made[0][2])) * up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("shape", [(4096, 14336), (4096, 4096), (37, 1000)])
def test_residuals(dtype: torch.dtype, kind: str, shape: tuple[int, int]) -> None:
    check_residuals(dtype, kind, shape, rows=1)


def check_residuals(dtype: torch.dtype, kind: str, shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    N, K = shape
    weight, scale, values = weight_of(N, K, kind, dtype)
    x = torch.randn(rows, 1, K, device="cuda").to(dtype)
    residual = torch.randn(rows, 1, N, device="cuda").to(dtype)
    out = graphed(
        triton_folded.folded_linears,
        x, [weight], [None], [0, N, 0], [scale], residual, "",
    )  # fmt: skip
    close(out, linear(x.double(), values) + residual.double())


FEW = [2, 8, 32, 64]
"""Numbers of rows for which there are kernels, also for weights in fp8."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("shape", [(4096, 14336), (4096, 3000), (2560, 500), (1000, 37)])
@pytest.mark.parametrize("rows", FEW)
def test_gates_of_a_few_rows(
    dtype: torch.dtype, kind: str, shape: tuple[int, int], rows: int
) -> None:
    """In one launch, or with the sum of splits (the small matrices)."""
    torch.manual_seed(0)
    K, N = shape
    x = torch.randn(rows, 1, K, device="cuda").to(dtype)
    made = [weight_of(N, K, kind, dtype) for _ in range(2)]
    biases = [torch.randn(N, device="cuda").to(dtype) for _ in range(2)]
    out = graphed(
        triton_folded.folded_linears,
        x, [each[0] for each in made], biases, [0, N, 0] * 2, [each[1] for each in made],
        None, "silu",
    )  # fmt: skip
    gate, up = (
        linear(x.double(), values, bias.double())
        for (_, _, values), bias in zip(made, biases, strict=True)
    )
    close(out, ACTIVATIONS["silu"](gate) * up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("shape", [(4096, 14336), (4096, 4096), (37, 1000), (20000, 500)])
@pytest.mark.parametrize("rows", FEW)
def test_residuals_of_a_few_rows(
    dtype: torch.dtype, kind: str, shape: tuple[int, int], rows: int
) -> None:
    check_residuals(dtype, kind, shape, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("shape", [(4096, 14336), (4096, 4096), (38, 1000)])
@pytest.mark.parametrize("rows", [1, *FEW])
def test_norms_of_products(
    dtype: torch.dtype, kind: str, shape: tuple[int, int], rows: int
) -> None:
    """As parts of the launch that sums the splits of a few rows."""
    torch.manual_seed(0)
    N, K = shape
    weight, scale, values = weight_of(N, K, kind, dtype)
    x = torch.randn(rows, 1, K, device="cuda").to(dtype)
    right = linear(x.double(), values)
    for parts in ((False, True, True), (True, True, False)):
        norms = norms_of(right.to(dtype), parts, seed=1)

        def added(norms: RowNorms = norms) -> Tensor:
            results = few_folded.normed_linear(x, weight, None, [0, N, 0], scale, *norms)
            return torch.stack(results)

        # Whole products of a single row are rounded before the norm.
        eps = 2 * torch.finfo(dtype).eps
        check(list(graphed(added)), right.to(dtype), norms, eps=eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), [(1, 48), (1, 1000), (3, 2560), (32, 4096), (2, 16384)])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_rows_and_what_follows(
    dtype: torch.dtype, rows: int, size: int, parts: tuple[bool, bool, bool]
) -> None:
    torch.manual_seed(0)
    row = torch.randn(rows, 1, size, device="cuda").to(dtype) * 3
    norms = norms_of(row, parts, seed=1)
    norms.after(row)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            results = norms.after(row)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    check(results, row, norms)


@pytest.mark.parametrize("weights", [None, "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_of_a_model(weights: str | None, dtype: str) -> None:
    """Compiled steps in CUDA graphs answer as plain forwards do."""
    if weights and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that multiplies fp8")
    replies = []
    for compiled in (True, False):
        star = StarLLM.from_pretrained(
            MODEL, dtype=dtype, block_size=512, device="cuda", weights=weights, compile=compiled
        )
        sample = make("niah_multikey", star.tokenizer, 2048, seed=0)
        context = star.encode(sample.context)
        queries = [fact.query for fact in sample.facts[:4]]
        replies.append([star.generate(context, each, max_new_tokens=12).text for each in queries])
    assert replies[0] == replies[1]
