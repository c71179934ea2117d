"""The kernel of decode steps of many rows on a GPU."""

from __future__ import annotations

import pytest
import torch

from star_attention.attention.attend import Rule
from tests.rows_oracle import CASES, expected, setup, tables

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_attention_of_rows(name: str, dtype: torch.dtype) -> None:
    """Within twice the error of a plain implementation in that precision."""
    from star_attention.attention.kernels import triton_rows

    torch.manual_seed(0)
    case = CASES[name]
    tensors = setup(case, dtype, "cuda")
    filled, tile_rows = tables(tensors)
    triton_rows.append(tensors.k_RGD, tensors.v_RGD, tables=filled, layer=1)
    for row, (tail, (k_GCD, v_GCD)) in enumerate(zip(case.tails, tensors.tails, strict=True)):
        assert torch.equal(k_GCD[:, tail], tensors.k_RGD[row])
        assert torch.equal(v_GCD[:, tail], tensors.v_RGD[row])
    rule = Rule(scale=0.2, window=case.window, softcap=case.softcap, dtype=dtype)
    out, lse = triton_rows.attend(
        tensors.q_RHD,
        case.G,
        tables=filled,
        layer=1,
        rule=rule,
        tile_rows=tile_rows,
        fp8=case.fp8,
    )
    right = expected(tensors, 0.2)
    # q, k, v and the result are rounded once each.
    unit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (out.double().cpu() - right.out_BQHD).norm() <= 2 * unit * right.out_BQHD.norm()
    torch.testing.assert_close(lse.double().cpu(), right.lse_BQH, atol=1e-3, rtol=1e-4)
