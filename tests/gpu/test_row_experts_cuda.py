"""Experts of a single row on a GPU, against products in float64."""

from __future__ import annotations

import pytest
import torch

from star_attention.linear.triton_experts import experts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_of_deepseek_v2_lite(tokens: int, dtype: torch.dtype) -> None:
    """Within twice the rounding of the hidden layer and the result."""
    torch.manual_seed(0)
    count, chosen, width, hidden = 16, 6, 1408, 2048
    options = dict(device="cuda", dtype=dtype)
    x = torch.randn(tokens, hidden, **options)
    gate_up = torch.randn(count, 2 * width, hidden, **options) / hidden**0.5
    down = torch.randn(count, hidden, width, **options) / width**0.5
    index = torch.stack([torch.randperm(count)[:chosen] for _ in range(tokens)]).cuda()
    share = torch.rand(tokens, chosen, device="cuda")
    right = torch.zeros(tokens, hidden, device="cuda", dtype=torch.float64)
    for token in range(tokens):
        for expert, weight in zip(index[token], share[token], strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            right[token] += weight * (down[expert].double() @ inner)
    out = experts(x, gate_up, down, index, share, "silu")
    budget = 2 * torch.finfo(dtype).eps + 1e-6
    assert (out - right).norm() <= budget * right.norm()
