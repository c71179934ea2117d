"""Experts of a single row on a GPU, against products in float64."""

from __future__ import annotations

import pytest
import torch

from star_attention.linear import triton_router
from star_attention.linear.triton_experts import experts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("with_shared", [False, True])
def test_experts_of_deepseek_v2_lite(with_shared: bool, tokens: int, dtype: torch.dtype) -> None:
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
    shared: list[torch.Tensor] = []
    residual = None
    if with_shared:
        shape = (2816, hidden)
        shared = [torch.randn(shape, **options) / hidden**0.5 for _ in range(2)]
        shared.append(torch.randn(hidden, 2816, **options) / 2816**0.5)
        residual = torch.randn(tokens, hidden, **options)
        gate, up, second = (weight.double() for weight in shared)
        inner = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
        right += inner @ second.T + residual
    out = experts(x, gate_up, down, index, share, "silu", shared, residual)
    budget = 2 * torch.finfo(dtype).eps + 1e-6
    assert (out - right).norm() <= budget * right.norm()


@pytest.mark.parametrize("kind", triton_router.KINDS)
@pytest.mark.parametrize(("count", "chosen"), [(8, 2), (64, 6), (160, 6), (256, 8), (1000, 4)])
def test_a_choice_of_experts(count: int, chosen: int, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(count, 2048, device="cuda") / 2048**0.5
    scores = triton_router.scores(x, weight, torch.float32)
    right = x.double() @ weight.double().T
    torch.testing.assert_close(scores.double(), right, atol=1e-5, rtol=1e-5)
    values, places = triton_router.largest(scores, chosen, kind, torch.float32)
    expected, right_places = triton_router.KINDS[kind](scores).topk(chosen)
    assert torch.equal(places, right_places)
    torch.testing.assert_close(values, expected)
    _, places = triton_router.largest(torch.zeros_like(scores), chosen, kind, torch.float32)
    assert places[0].tolist() == list(range(chosen))
