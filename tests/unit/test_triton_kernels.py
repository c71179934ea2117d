"""Our Triton kernels in Triton's interpreter. tests/gpu/test_fast_cuda.py runs them on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

from star_attention.attention.attend import Rule
from star_attention.attention.state import State, merge, merge_last
from star_attention.hf.execution import compiled
from tests.answer_oracle import (
    CASES,
    SHARDED_CASES,
    SHARDS,
    expected,
    real_rows,
    setup,
    tables,
)
from tests.compiling import counted_launches, fresh_code
from tests.families import build

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_answer, triton_merge  # noqa: E402
from star_attention.linear import triton_row  # noqa: E402


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        ("a window", torch.float16),
        ("a query", torch.float16),
    ],
)
def test_attention_of_phase_2(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    tensors = setup(case, dtype, "cpu")
    kv_tables, _addressed = tables(tensors)
    triton_answer.append(tensors.k_RGQD, tensors.v_RGQD, tables=kv_tables, layer=1)
    new = slice(case.T, case.T + case.Q)
    assert torch.equal(tensors.tail_k_RGCD[:, :, new], tensors.k_RGQD)
    assert torch.equal(tensors.tail_v_RGCD[:, :, new], tensors.v_RGQD)
    out, lse = triton_answer.attend(
        tensors.q_RQHD,
        case.G,
        tables=kv_tables,
        layer=1,
        rule=Rule(scale=0.2, window=case.window, softcap=case.softcap),
        fp8=case.fp8,
        splits=3,
    )
    right, real = expected(tensors, 0.2), real_rows(case)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-3
    assert (out.double() - right.out_BQHD)[real].norm() <= tolerance * right.out_BQHD[real].norm()
    torch.testing.assert_close(lse.double()[real], right.lse_BQH[real], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("one token", "an idle rank"),
        ("a window", "stripes"),
        ("fp8", "stripes"),
        *((name, "zig-zag") for name in SHARDED_CASES),
    ],
)
def test_attention_of_phase_2_over_shards(
    name: str, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks append to the tail, the last one attends to it; the merged states are the whole."""
    monkeypatch.setattr(triton_answer, "TAIL_SPLITS", 1)
    torch.manual_seed(0)
    case = SHARDED_CASES[name]
    tensors, states = setup(case, torch.float32, "cpu"), []
    for rank, segments in enumerate(SHARDS[shards], start=1):
        kv_tables, _addressed = tables(tensors, segments, holds_tail=rank == len(SHARDS[shards]))
        triton_answer.append(tensors.k_RGQD, tensors.v_RGQD, tables=kv_tables, layer=1)
        rule = Rule(scale=0.2, window=case.window)
        states.append(
            triton_answer.attend(
                tensors.q_RQHD, case.G, tables=kv_tables, layer=1, rule=rule, fp8=case.fp8, splits=1
            )
        )
    assert not any(state.out_BQHD.isnan().any() or state.lse_BQH.isnan().any() for state in states)
    out, lse = merge(states)
    right, real = expected(tensors, 0.2), real_rows(case)
    assert (out.double() - right.out_BQHD)[real].norm() <= 2e-6 * right.out_BQHD[real].norm()
    torch.testing.assert_close(lse.double()[real], right.lse_BQH[real], atol=1e-4, rtol=1e-5)


def test_a_query_that_sees_no_key_of_a_rank() -> None:
    tensors = setup(SHARDED_CASES["a window that ends in the tail"], torch.float32, "cpu")
    for segments in ([], [(0, 300)]):
        kv_tables, _addressed = tables(tensors, segments, holds_tail=False)
        rule = Rule(scale=0.2, window=tensors.case.window)
        out, lse = triton_answer.attend(
            tensors.q_RQHD, tensors.case.G, tables=kv_tables, layer=1, rule=rule, splits=1
        )
        assert (out == 0).all()
        assert (lse == float("-inf")).all()


@pytest.mark.parametrize("first", [0, 4])
def test_merging(first: int) -> None:
    """Both layouts of kernels, rows without keys, and a second state of the last rows only."""
    torch.manual_seed(0)
    a = State(torch.randn(2, 9, 3, 80), torch.randn(2, 9, 3) * 50)
    b = State(torch.randn(2, 3, 9 - first, 80).transpose(1, 2), torch.randn(2, 9 - first, 3) * 50)
    for state, rows in ((a, ((0, 0, 0), (0, 8, 1))), (b, ((0, -1, 1), (1, 0, 2)))):
        for row in rows:
            state.lse_BQH[row], state.out_BQHD[row] = float("-inf"), 0.0
    out, lse = triton_merge.merge(*a, *b, dtype=torch.float32)
    right = merge_last(a, b) if first else merge([a, b])
    torch.testing.assert_close(out, right.out_BQHD)
    torch.testing.assert_close(lse, right.lse_BQH)


@pytest.mark.parametrize("bias", [False, True])
def test_a_single_row_times_a_matrix(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 1500), torch.randn(37, 1500)
    bias_N = torch.randn(37) if bias else None
    out = triton_row.linear(x, weight, bias_N)
    torch.testing.assert_close(out, linear(x, weight, bias_N), atol=1e-4, rtol=1e-5)


def test_a_single_row_times_several_matrices() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(1, 1, 70), [torch.randn(N, 70) for N in (37, 4, 16)]
    biases = [None, torch.randn(4), None]
    outs = triton_row.linears(x, weights, biases, [0, 37, 0, 0, 4, 0, 0, 16, 0], [None] * 3)
    for out, weight, bias_N in zip(outs, weights, biases, strict=True):
        torch.testing.assert_close(out, linear(x, weight, bias_N), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("rows", "first_column"), [((5, 21), 0), ((0, 37), 30), ((16, 37), 16)])
def test_a_single_row_times_a_slice(rows: tuple[int, int], first_column: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 1, 64), torch.randn(37, 100), torch.randn(37)
    out = triton_row.linear(x, weight, bias, rows=rows, first_column=first_column)
    part = weight[rows[0] : rows[1], first_column : first_column + 64]
    right = linear(x, part, bias[rows[0] : rows[1]])
    torch.testing.assert_close(out, right, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("matrices", [1, 2, 3, 5])
def test_products_with_the_same_row_share_launches(matrices: int) -> None:
    torch.manual_seed(0)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        outs = [triton_row.linear(x, weight, None, rows=(2, 8)) for weight in weights]
        return triton_row.linear(torch.cat(outs, -1), last, None, first_column=1)

    x, last, weights = (
        torch.randn(1, 1, 70),
        torch.randn(3, 6 * matrices + 2),
        torch.randn(matrices, 8, 70).unbind(),
    )
    traced = make_fx(layer)(x, *weights)
    triton_row.fuse_linears(traced.graph)
    traced.recompile()
    op = torch.ops.star_attention.linears.default
    sizes = [len(node.args[1]) for node in traced.graph.nodes if node.target == op]
    assert sizes == {1: [1, 1], 2: [2, 1], 3: [3, 1], 5: [3, 2, 1]}[matrices]
    torch.testing.assert_close(traced(x, *weights), layer(x, *weights))


def test_a_compiled_layer_has_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """gate and up in one launch, then down: the pass recognizes the graphs of torch.compile."""
    layer: Any = build("llama").model.layers[0].mlp
    x = torch.randn(1, 1, layer.gate_proj.in_features)
    expected = layer(x)
    launches = counted_launches(monkeypatch)
    for module in (layer.gate_proj, layer.up_proj, layer.down_proj):
        module.__class__ = triton_row.RowLinear
    fused = compiled._Passes("fused linears alone", compiled._fuse_linears)
    options = {"post_grad_custom_pre_pass": fused}
    compiled_layer = torch.compile(layer, fullgraph=True, options=options)
    with torch.no_grad(), fresh_code():
        torch.testing.assert_close(compiled_layer(x), expected, atol=1e-5, rtol=1e-4)
    assert launches == [2, 1]
