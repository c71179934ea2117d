"""Rotary embeddings by complex numbers, which compiled layers compute in reals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

from star_attention.hf.execution.complex_products import multiply_reals

aten = torch.ops.aten


def rotated(q_BSX: Tensor, k_BSR: Tensor, angles_BSP: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the last 8 elements of 3 heads' queries, and a key, as DeepSeek does."""
    q_BHSD = q_BSX.unflatten(-1, (3, -1)).transpose(1, 2)
    return apply_rotary_emb(q_BHSD[..., 4:], k_BSR[:, None], angles_BSP)


@pytest.mark.parametrize("tokens", [1, 5])
def test_products_are_written_out_in_reals(tokens: int) -> None:
    torch.manual_seed(0)
    angles_BSP = torch.polar(torch.ones(1, 4, tokens), torch.randn(1, 4, tokens)).mT
    inputs = torch.randn(1, tokens, 36), torch.randn(1, tokens, 8), angles_BSP
    traced = make_fx(rotated, tracing_mode="symbolic")(*inputs)
    multiply_reals(traced.graph)
    traced.graph.lint()
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert aten.view_as_complex.default not in targets
    assert targets.count(aten.mul.Tensor) == 8
    for node in traced.graph.find_nodes(op="call_function", target=aten.view_as_real.default):
        assert node.args[0].target is aten.unsqueeze.default, "only of the angles"
    traced.recompile()
    for actual, expected in zip(traced(*inputs), rotated(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_complex_results_stay() -> None:
    """A product that is not viewed as reals, a sum, and a product with a real number."""

    def product(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a * a, torch.view_as_real(a + a), torch.view_as_real(a * b)

    inputs = torch.randn(3, dtype=torch.complex64), torch.randn(3)
    traced = make_fx(product)(*inputs)
    before = [node.target for node in traced.graph.nodes]
    multiply_reals(traced.graph)
    assert [node.target for node in traced.graph.nodes] == before
