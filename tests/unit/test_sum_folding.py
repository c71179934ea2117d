"""Sums of a single row over ranks with the products and norms around them, by the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from star_attention.distributed import SoloComm
from star_attention.hf.execution import sums
from tests.unit.test_folding import Row, traced

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.linear import triton_row  # noqa: E402
from tests.unit import test_norm_folding  # noqa: E402
from tests.unit.test_norm_folding import launch_of  # noqa: E402

SOLO = SoloComm()
sums.summing(SOLO)
(SHARD,) = (number for number, comm in sums._comms.items() if comm is SOLO)
"""Sums over one rank, which are those of compiled layers."""


class SummedRow(Row):
    def forward(self, input: Tensor) -> Tensor:
        total: Tensor = sums._sum_op(super().forward(input), "tp", SHARD)
        return total


def folded(module: torch.fx.GraphModule) -> list[str]:
    return test_norm_folding.folded(module, sums.OPERATIONS)


@pytest.mark.parametrize(
    ("family", "launches"),
    [
        ("llama", ["norm", "3", "1 sum + norm", "2", "1 sum +"]),
        ("gemma3", ["norm", "3", "1 sum post + norm", "2", "1 sum post +"]),
        ("granite", ["norm", "3", "1 sum 0.5 + norm", "2", "1 sum 0.5 +"]),
        # The norm of both products is not an RMS norm.
        ("cohere", ["3", "1 sum +", "2", "1 sum +"]),
    ],
)
def test_layers_of_families(family: str, launches: list[str]) -> None:
    test_norm_folding.check_layer(family, launches, SummedRow, sums.OPERATIONS)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return triton_row.linear(x, weight, None)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def _sum(x: Tensor) -> Tensor:
    total: Tensor = sums._sum_op(x, "tp", SHARD)
    return total


def _scaled_residual(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return torch.add(x, _sum(_linear(x, a)), alpha=2)


def _sum_used_twice(x: Tensor, w: Tensor, a: Tensor) -> Any:
    total = _sum(_linear(x, a))
    return x + total, total


def _residual_after_the_sum(x: Tensor, w: Tensor, a: Tensor) -> Any:
    total = _sum(_linear(x, a))
    residual = _linear(x * w, a)
    return total + residual, residual


@pytest.mark.parametrize("function", [_scaled_residual, _sum_used_twice, _residual_after_the_sum])
def test_what_is_not_recognized_stays(function: Callable[..., Any]) -> None:
    test_norm_folding.check_stays(function, sums.OPERATIONS)


def _used_norm(x: Tensor, w: Tensor, a: Tensor) -> Any:
    h = x + _sum(_linear(x, a))
    y = _norm(h, 1 + w)
    return _linear(y, a), y.sin(), h * 2


def test_results_that_others_need() -> None:
    torch.manual_seed(0)
    args = torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48)
    module = traced(_used_norm, *args)
    expected = module(*args)
    assert folded(module) == ["1 sum + norm", "1"]
    torch.testing.assert_close(module(*args), expected, atol=1e-5, rtol=1e-4)


def _sum_of_two_products(x: Tensor, w: Tensor, a: Tensor) -> Any:
    """As of experts."""
    h = x + _sum(_linear(x, a) + _linear(x * w, a))
    return _linear(_norm(h, w), a)


def test_sums_without_a_product() -> None:
    torch.manual_seed(0)
    args = torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48)
    module = traced(_sum_of_two_products, *args)
    expected = module(*args)
    assert folded(module)[-2:] == ["sum + norm", "1"]
    torch.testing.assert_close(module(*args), expected, atol=1e-5, rtol=1e-4)


def _two_sums(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return x + _sum(_linear(x, a)) + _sum(_linear(x * w, a))


def test_ranks_meet_in_the_order_of_layers_that_are_not_compiled() -> None:
    torch.manual_seed(0)
    args = torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48)
    module = traced(_two_sums, *args, fuse=False)
    products = [node.args[0].args[0] for node in module.graph.nodes if launch_of(node) == "sum"]
    order = [product.args[0] for product in products]
    expected = module(*args)
    assert folded(module) == ["1 sum +", "1 sum +"]
    ours = torch.ops.star_attention.sum_product_norms.default
    found = module.graph.find_nodes(op="call_function", target=ours)
    assert [node.args[0] for node in found] == order
    torch.testing.assert_close(module(*args), expected, atol=1e-5, rtol=1e-4)
