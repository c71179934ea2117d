"""A token's choice of experts in Triton's interpreter; test_row_experts_cuda.py has GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.compiling import traced
from tests.engines import tiny

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.linear import routing, triton_router  # noqa: E402

OPS = torch.ops.star_attention


@pytest.mark.parametrize("kind", triton_router.KINDS)
@pytest.mark.parametrize(("size", "k"), [(8, 2), (64, 6), (160, 8), (5, 5), (1000, 3)])
def test_the_largest(size: int, k: int, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, size) * 2
    values, places = triton_router.largest(x, k, kind, torch.float32)
    right, right_places = triton_router.KINDS[kind](x).topk(k)
    assert torch.equal(places, right_places)
    torch.testing.assert_close(values, right)


def test_equal_numbers_infinities_and_nan() -> None:
    """Every place is that of another number, and NaN is the largest."""
    x = torch.tensor([[1.0, -float("inf"), 1.0, float("nan"), 0.0, -0.0, float("inf"), 1.0]])
    values, places = triton_router.largest(x, 8, "", torch.float32)
    assert places[0].tolist() == [3, 6, 0, 2, 7, 4, 5, 1]
    torch.testing.assert_close(values[0], x[0][places[0]], equal_nan=True, atol=0, rtol=0)
    same, places = triton_router.largest(torch.zeros(1, 70).half(), 3, "softmax", torch.float32)
    assert places[0].tolist() == [0, 1, 2]
    torch.testing.assert_close(same, torch.full((1, 3), 1 / 70))


@pytest.mark.parametrize("dtypes", ["fp32", "fp16", "mixed"])
def test_scores(dtypes: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 300), torch.randn(9, 300)
    x = x if dtypes == "fp32" else x.half()
    weight = weight.half() if dtypes == "fp16" else weight
    out = triton_router.scores(x, weight, torch.float32)
    torch.testing.assert_close(out, functional.linear(x.float(), weight.float()))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("deepseek_v2", ["softmax"]),
        ("qwen3_moe", ["softmax"]),
        ("mixtral", ["softmax"]),
        # Groups are chosen, by the sums of their two largest scores, then their experts.
        ("deepseek_v3", ["", "", ""]),
    ],
)
def test_routers_of_families(family: str, kinds: list[str]) -> None:
    torch.manual_seed(0)
    found = [m for m in tiny(family).modules() if type(m).__name__.endswith(("Router", "Moe"))]
    router: Any = next(m for m in found if hasattr(m, "weight"))
    x = torch.randn(1, router.weight.shape[1])

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(router, {"weight": weight}, (x,))
        return tuple(out)

    with torch.no_grad():
        expected = forward(x, router.weight)
        module = traced(forward, x, router.weight)
        routing.route(module.graph)
        module.graph.lint()
        module.recompile()
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        assert [node.args[2] for node in nodes if node.target == OPS.largest.default] == kinds
        assert sum(node.target == OPS.scores.default for node in nodes) == 1
        assert not any("topk" in str(node.target) or "mm" in str(node.target) for node in nodes)
        out = module(x, router.weight)
    for actual, right in zip(out, expected, strict=True):
        if right.dim() == 2 and right.shape[1] != router.weight.shape[0]:
            actual, right = actual.sort(-1)[0], right.sort(-1)[0]
        torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-4)


def test_other_searches_stay() -> None:
    """The smallest, several rows, another axis; scores that others read, too."""

    def searches(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        smallest = x.topk(2, largest=False)[0]
        return smallest, rows.topk(2)[0], rows.topk(2, 0)[1]

    inputs = torch.randn(1, 9), torch.randn(3, 9)
    module = traced(searches, *inputs)
    before = [node.target for node in module.graph.nodes]
    routing.route(module.graph)
    assert [node.target for node in module.graph.nodes] == before


def test_scores_that_others_read_stay() -> None:
    def chosen(x: Tensor) -> tuple[Tensor, ...]:
        scores = x.softmax(-1)
        return (*scores.topk(2), scores)

    x = torch.randn(1, 9)
    module = traced(chosen, x)
    routing.route(module.graph)
    module.graph.lint()
    module.recompile()
    for actual, right in zip(module(x), chosen(x), strict=True):
        torch.testing.assert_close(actual, right)
