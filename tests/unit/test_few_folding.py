"""Gates, residuals and norms in the launches of a few rows, in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from star_attention import StarLLM
from star_attention.attention.kernels import row_tables
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution import compiled
from star_attention.hf.execution.rows import RowForwards
from star_attention.linear import fp8
from tests.compiling import fresh_code, half_layer, of_any_rows, of_weights
from tests.decode_rows import prefilled, step
from tests.engines import ids, tiny
from tests.recorders import few_runs, with_graphs
from tests.row_norms import PARTS, exact, norms_of
from tests.unit.test_folding import Row
from tests.unit.test_norm_folding import launch_of

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.linear import (  # noqa: E402
    folding,
    norm_folding,
    triton_few,
    triton_few_folded,
    triton_folded,
    triton_row,
)
from star_attention.linear.triton_experts import ACTIVATIONS  # noqa: E402

ROWS = [2, 5, 32, 100]


@pytest.fixture(params=[1, 16], ids=["whole", "splits"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A GPU of few processors, and one of many, for which columns are split."""
    monkeypatch.setattr(triton_few, "_processors", lambda device: request.param)
    monkeypatch.setattr(triton_few, "_LEAST_K", 128)
    return bool(request.param > 1)


def matrix(N: int, K: int, kind: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return a weight, its scales or None, and its values."""
    weight = torch.randn(N, K) * K**-0.5
    if kind == "fp8":
        q, scale = fp8.quantize(weight)
        return q, scale[:, 0].contiguous(), q.double() * scale
    dtype = torch.float32 if kind == "fp32" else torch.float16
    return weight.to(dtype), None, weight.to(dtype).double()


def close(out: Tensor, right: Tensor, *, roundings: int = 1) -> None:
    """Check a result in half precision against one in float64."""
    assert (out.dtype, out.shape) == (torch.half, right.shape)
    error = (out.double() - right).norm()
    assert error <= roundings * torch.finfo(torch.half).eps / 2 * right.norm()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("kind", "activation"), [("fp16", "silu"), ("fp16", "gelu"), ("fp8", "gelu_tanh")]
)
def test_gated_products(rows: int, kind: str, activation: str, splits: bool) -> None:
    """Parts of matrices, of an uneven number of rows and columns."""
    torch.manual_seed(0)
    K, N = 420, 85
    x = torch.randn(rows, 1, K).half()
    gate, up = (matrix(N + 4, K + 4, kind) for _ in "ab")
    biases = [torch.randn(N + 4).half() if activation == "gelu" else None for _ in "ab"]
    parts = [(1, 4), (3, 0)]
    rights = []
    for (_, _, values), bias, (first, column) in zip((gate, up), biases, parts, strict=True):
        right = x.double() @ values[first : first + N, column : column + K].T
        rights.append(right if bias is None else right + bias[first : first + N].double())
    out = triton_folded.folded_linears(
        x, [gate[0], up[0]], biases, [number for first, column in parts
        for number in (first, N, column)], [gate[1], up[1]], None, activation,
    )  # fmt: skip
    # Above the most rows that kernels take, both products and the activation are rounded before.
    many = rows > triton_few.MOST[gate[0].element_size()]
    close(out, ACTIVATIONS[activation](rights[0]) * rights[1], roundings=4 if many else 1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["fp16", "fp8"])
def test_a_residual_is_added_before_rounding(rows: int, kind: str, splits: bool) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(rows, 1, 400).half(), torch.randn(rows, 1, 70).half()
    weight, scale, values = matrix(70, 400, kind)
    bias = torch.randn(70).half()
    out = triton_folded.folded_linears(x, [weight], [bias], [0, 70, 0], [scale], residual, "")
    right = x.double() @ values.T + bias.double() + residual.double()
    if rows > triton_few.MOST[weight.element_size()]:
        # Torch's product is rounded before.
        torch.testing.assert_close(out, right.half(), atol=4e-3, rtol=2e-3)
    else:
        torch.testing.assert_close(out, right.half(), atol=1e-6, rtol=torch.finfo(torch.half).eps)


@pytest.mark.parametrize("rows", [1, *ROWS])
@pytest.mark.parametrize("parts", [each for each in PARTS if each[1] or each[2]], ids=str)
def test_norms_of_products(rows: int, parts: tuple[bool, bool, bool], splits: bool) -> None:
    """With the splits' sums, or as a launch of their own."""
    torch.manual_seed(0)
    N, kind = (74, "fp8") if rows == 5 else (70, "fp16")
    x, (weight, scale, values) = torch.randn(rows, 1, 400).half(), matrix(N, 400, kind)
    bias = torch.randn(N).half()
    product = x.double() @ values.T + bias.double()
    norms = norms_of(product.half(), parts, seed=rows)
    calls: list[int] = []
    sums = triton_few_folded._normed_sums

    def counted(*args: Any) -> list[Tensor]:
        calls.append(1)
        return sums(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_few_folded, "_normed_sums", counted)
        results = triton_few_folded.normed_linear(x, weight, bias, [0, N, 0], scale, *norms)
    # A product that is not split is rounded before its norm.
    assert len(calls) == (splits and 1 < rows <= triton_few.MOST[weight.element_size()])
    rights = exact(product if calls else product.half(), norms)
    assert len(results) == len(rights)
    for result, right in zip(results, rights, strict=True):
        close(result, right, roundings=1 if calls else 2)


def test_many_rows_and_other_precisions_are_multiplied_by_torch() -> None:
    torch.manual_seed(0)
    for rows, dtype in ((triton_few.MOST[2] + 1, torch.half), (3, torch.float32)):
        x, weight = torch.randn(rows, 1, 48).to(dtype), torch.randn(48, 48).to(dtype)
        multiply = triton_folded.folded_linears
        gated = multiply(x, [weight] * 2, [None] * 2, [0, 48, 0] * 2, [None] * 2, None, "silu")
        product = functional.linear(x, weight)
        assert torch.equal(gated, functional.silu(product) * product)
        added = multiply(x, [weight], [None], [0, 48, 0], [None], x, "")
        assert torch.equal(added, product + x)


# ------------------------------------------------------------------------ layers


def passes(graph: torch.fx.Graph) -> None:
    """Those of a step of rows, but for rotary embeddings."""
    triton_row.fuse_linears(graph)
    folding.fold(graph)
    norm_folding.fold(graph)
    norm_folding.join_products(graph)


def launches_of(graph: torch.fx.Graph) -> list[str]:
    return [launch for node in graph.nodes if (launch := launch_of(node))]


@pytest.mark.parametrize(
    ("family", "launches"),
    [
        ("llama", ["norm", "3", "1 + norm", "2", "1+"]),
        ("gemma3", ["norm", "3", "1 post + norm", "2", "1 post +"]),
        pytest.param("olmo2", ["3", "1 post +", "2", "1 post +"], marks=pytest.mark.slow),
        # Products are multiplied with a number before the sum; the last one's is Inductor's.
        pytest.param("granite", ["norm", "3", "1 0.5 + norm", "2", "1"], marks=pytest.mark.slow),
        # Two products are added to one residual, and its norm has no root of a mean square alone.
        pytest.param("cohere", ["3", "2", "1+", "1+"], marks=pytest.mark.slow),
        # No gate.
        pytest.param("arcee", ["norm", "3", "1 + norm", "1", "1+"], marks=pytest.mark.slow),
    ],
)
def test_layers_of_families(
    family: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code for all numbers of rows, as the plain layer computes."""
    monkeypatch.setattr(triton_few, "_processors", lambda device: 16)
    monkeypatch.setattr(triton_few, "_LEAST_K", 32)
    model, layer, types = half_layer(family)
    weights = list(dict(layer.named_parameters()).values())
    stock = [module for module in layer.modules() if type(module) is nn.Linear]

    def forward(x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Tensor:
        return of_weights(layer, (cos, sin))(x, *weights)

    folded, graphs = of_any_rows(forward, passes)
    for rows in (5, 33, 2, triton_few.MOST[2] + 1):
        x = torch.randn(rows, 1, model.config.hidden_size).half()
        positions = torch.arange(rows)[:, None]
        call = x, *model.model.rotary_emb(x, positions, **types), *weights
        for module in stock:
            module.__class__ = nn.Linear
        with torch.no_grad():
            expected = forward(*call)
        for module in stock:
            module.__class__ = Row
        out = folded(*call)
        eps = torch.finfo(torch.half).eps
        assert (out.float() - expected.float()).norm() <= 4 * eps * expected.float().norm()
    (graph,) = graphs
    assert launches_of(graph.graph) == launches


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return triton_row.linear(x, weight, None)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _norm_of_heads(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
    """Kernels of Inductor's take many short rows better."""
    heads = _norm(_linear(x, a).view(len(x), 1, 4, 12), w[:12])
    return _linear(heads.view(len(x), 1, 48), a)


def _other_rows(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
    """A residual that is the same for all rows."""
    return _linear(x, a) + w


def _other_norm(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
    return _linear(_norm(x, w) * 2, a)


def _several_of_each(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
    x = x.repeat(1, 2, 1)
    return x + _linear(_norm(x, w), a)


@pytest.mark.parametrize("function", [_norm_of_heads, _other_rows, _other_norm, _several_of_each])
def test_what_is_not_recognized_stays(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    folded, graphs = of_any_rows(function, passes)
    x, *weights = torch.randn(5, 1, 48), torch.randn(48), torch.randn(48, 48)
    torch.testing.assert_close(folded(x, *weights), function(x, *weights), atol=1e-5, rtol=1e-4)
    assert set(launches_of(graphs[0].graph)) == {"1"}


def _norm_that_others_need(x: Tensor, w: Tensor, a: Tensor) -> Any:
    h = x + _linear(x, a)
    y = _norm(h, w)
    return _linear(y, a) + h.sin() + y.cos()


def _product_that_others_need(x: Tensor, w: Tensor, a: Tensor) -> Any:
    y = _linear(x, a)
    return x + _norm(y, w), y


@pytest.mark.parametrize(
    ("function", "launches"),
    [(_norm_that_others_need, ["1 + norm", "1+"]), (_product_that_others_need, ["1", "post +"])],
)
def test_results_that_others_need(function: Callable[..., Any], launches: list[str]) -> None:
    torch.manual_seed(0)
    folded, graphs = of_any_rows(function, passes)
    call = torch.randn(5, 1, 48), torch.randn(48), torch.randn(48, 48)
    torch.testing.assert_close(folded(*call), function(*call), atol=1e-5, rtol=1e-4)
    assert launches_of(graphs[0].graph) == launches


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16", "fp8"])
def test_steps_of_rows_are_folded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers with our attention in them, in the stand-in for a CUDA graph."""
    few_runs(monkeypatch)
    monkeypatch.setattr(compiled, "triton_works", lambda device: True)
    monkeypatch.setattr(row_tables, "PROGRAMS", 2)
    monkeypatch.setattr(triton_few, "_processors", lambda device: 16)
    monkeypatch.setattr(triton_few, "_LEAST_K", 32)
    found: list[list[str]] = []
    join = norm_folding.join_products

    def kept(graph: torch.fx.Graph) -> None:
        join(graph)
        found.append([each for each in launches_of(graph) if each])

    monkeypatch.setattr(norm_folding, "join_products", kept)
    sizes: Any = dict(block_size=24, anchor_size=10, tokens_per_forward=48)
    model: Any = copy.deepcopy(tiny("llama")).half()
    for module in list(model.model.layers.modules()) if kind == "fp8" else []:
        if type(module) is nn.Linear:
            fp8.Fp8Linear.convert(module)
            module.has_kernels = True
    star = StarLLM(model, compile=True, **sizes)
    rows = prefilled(star, star.encode(ids(70)), ids(4, seed=3), ids(5, seed=4), ids(9, seed=5))
    with_graphs(star)
    forwards = RowForwards(star.runtime.handle, star.runtime.comm)
    with fresh_code():
        for number, members in enumerate((rows, rows[1:])):
            logits_RV = step(forwards, members, number, RowSet([row.kv for row in members]))
            expected_RV = torch.stack([row.logits_SV[number + 1] for row in members])
            torch.testing.assert_close(logits_RV, expected_RV, atol=2e-2, rtol=1e-2)
    # The norm after the layers is compiled, too, and has none.
    assert [each for each in found if each] == [["norm", "3", "1 + norm", "2", "1+"]]


def test_rows() -> None:
    """One, or one of each of a number that varies; not several, nor a number of heads."""
    found: dict[str, bool] = {}

    def look(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if folding.value_of(node) is not None:
                found[node.name] = folding.are_rows(node)

    def function(x: Tensor) -> Any:
        return x.sin(), x.repeat(1, 2, 1).cos(), x.view(len(x), 1, 4, 12).tan(), x[:1].exp()

    looked_at, _ = of_any_rows(function, look)
    looked_at(torch.randn(5, 1, 48))
    assert (found["sin"], found["cos"], found["tan"], found["exp"]) == (True, False, False, True)
