"""Our kernels for products of one row and of a few on a GPU, against torch."""

from __future__ import annotations

import pytest
import torch

from star_attention.linear import fp8

triton_row = pytest.importorskip("star_attention.linear.triton_row")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(128, 4096), (1000, 96), (37, 14336)])
def test_a_single_row_times_a_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape).cuda().bfloat16(), torch.randn(1, 1, shape[1]).cuda().bfloat16()
    exact = x.double() @ weight.double().T
    budget = 2 * (x @ weight.T - exact).norm()
    assert (triton_row.linear(x, weight, None) - exact).norm() <= budget
    short, bias = torch.randn(5, shape[1]).cuda().bfloat16(), torch.randn(5).cuda().bfloat16()
    parts = [0, shape[0], 0, 0, 5, 0, 0, shape[0], 0]
    first, second, third = triton_row.linears(
        x, [weight, short, weight], [None, bias, None], parts, [None] * 3
    )
    assert torch.equal(first, third)
    assert torch.equal(first, triton_row.linear(x, weight, None))
    assert torch.equal(second, triton_row.linear(x, short, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("rows", [2, 8, 17, 32, 64, 100])
def test_a_few_rows_times_matrices(dtype: torch.dtype, kind: str, rows: int) -> None:
    """With columns in splits (the small matrices alone) and whole, also where tiles are cut."""
    torch.manual_seed(0)
    for K in (4096, 2504):
        x = torch.randn(rows, 1, K, device="cuda", dtype=dtype)
        made = [torch.randn(N, K, device="cuda", dtype=dtype) * 0.02 for N in (9000, 1024, 1000)]
        quantized = [fp8.quantize(weight) for weight in made]
        scales = [scale[:, 0].contiguous() if kind == "fp8" else None for _, scale in quantized]
        weights = [q for q, _ in quantized] if kind == "fp8" else made
        parts = [0, 9000, 0, 0, 1024, 0, 7, 900, 0]
        for first in (0, 1):
            outs = triton_row.linears(
                x, weights[first:], [None] * (3 - first), parts[3 * first :], scales[first:]
            )
            for at, out in enumerate(outs, start=first):
                values = made[at].float()
                if kind == "fp8":
                    values = quantized[at][0].float() * quantized[at][1]
                start, size = parts[3 * at], parts[3 * at + 1]
                right = x.float() @ values[start : start + size].T
                error = (out.float() - right).norm() / right.norm()
                assert error < torch.finfo(dtype).eps
