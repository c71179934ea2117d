"""Our kernels for one row and for a few in Triton's interpreter, which has no products in bf16.

tests/gpu/test_fp8_weights_cuda.py runs them on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch.nn.functional import linear

from star_attention.hf.execution import compiled
from star_attention.linear import fp8
from star_attention.linear.fp8 import Fp8Linear
from tests.compiling import counted_launches, fresh_code
from tests.fp8_models import quantized

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.linear import triton_few, triton_row, triton_row_fp8  # noqa: E402


def matrix(N: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight in fp8, its scales, and its values."""
    q_NK, scale_N1 = fp8.quantize(torch.randn(N, K))
    return q_NK, scale_N1[:, 0].contiguous(), q_NK.float() * scale_N1


@pytest.mark.parametrize("N", [37, 64, 1])
@pytest.mark.parametrize("K", [96, 2048, 4500])
def test_a_single_row(N: int, K: int) -> None:
    torch.manual_seed(0)
    weight, scale, values = matrix(N, K)
    x, bias = torch.randn(1, 1, K), torch.randn(N)
    out = triton_row.linear(x, weight, bias, scale=scale)
    torch.testing.assert_close(out, linear(x, values, bias), atol=1e-3, rtol=1e-4)


def test_a_single_row_times_slices_of_several_matrices() -> None:
    torch.manual_seed(0)
    matrices = [matrix(N, 100) for N in (37, 4, 16)]
    x, bias = torch.randn(1, 1, 64), torch.randn(4)
    outs = triton_row.linears(
        x,
        [weight for weight, _, _ in matrices],
        [None, bias, None],
        [5, 16, 30, 0, 4, 0, 3, 13, 36],
        [scale for _, scale, _ in matrices],
    )
    rights = [
        linear(x, matrices[0][2][5:21, 30:94]),
        linear(x, matrices[1][2][:, :64], bias),
        linear(x, matrices[2][2][3:16, 36:]),
    ]
    for out, right in zip(outs, rights, strict=True):
        torch.testing.assert_close(out, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "K"),
    [("_TILE", 512), ("_TILE_OF_MANY", 1536), ("_TILE_OF_FEW", 3072), ("_TILE_OF_GATED", 2304)],
)
def test_a_single_row_in_words(
    name: str, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of e4m3, also subnormals and both zeros, several matrices, a bias."""
    torch.manual_seed(0)
    tile = getattr(triton_row_fp8, name)
    monkeypatch.setattr(triton_row_fp8, "tile", lambda rows, K, gated=False: tile)
    numbers = torch.arange(256, dtype=torch.uint8).view(fp8.DTYPE)
    numbers = numbers[numbers.float().isfinite()]
    weights = [numbers[torch.randint(0, len(numbers), (N, K))] for N in (37, 16, 1)]
    scales = [torch.rand(N) / fp8.LARGEST for N in (37, 16, 1)]
    x, bias = torch.randn(1, 1, K).to(dtype), torch.randn(16).to(dtype)
    assert triton_row_fp8.serves(x, weights, tile)
    parts = [0, 37, 0, 0, 16, 0, 0, 1, 0]
    outs = triton_row.linears(x, weights, [None, bias, None], parts, scales)
    for out, weight, scale, bias_N in zip(outs, weights, scales, [0, bias, 0], strict=True):
        right = linear(x.double(), weight.double() * scale[:, None]) + bias_N
        # Rounded once.
        torch.testing.assert_close(out, right.to(dtype), atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_rows_that_are_not_read_in_words() -> None:
    """Addresses between words, other precisions and lengths take the loop for any of them."""
    weight, scale, values = matrix(20, 2100)
    tile = triton_row_fp8.tile(20, 2048)
    for x, first in ((torch.randn(2048).half(), 2), (torch.randn(2049).half()[1:], 4)):
        assert not triton_row_fp8.serves(x, [weight[:, first : first + 2048]], tile)
        out = triton_row.linear(x, weight, None, first_column=first, scale=scale)
        right = linear(x.float(), values[:, first : first + 2048])
        torch.testing.assert_close(out.float(), right, atol=1e-2, rtol=1e-3)
    x = torch.randn(2048).half()
    aligned = [weight[:, 4:2052]]
    assert triton_row_fp8.serves(x, aligned, tile)
    assert not triton_row_fp8.serves(x.float(), aligned, tile)
    assert not triton_row_fp8.serves(torch.randn(2049).half()[1:], aligned, tile)
    assert not triton_row_fp8.serves(x, [*aligned, values[:, 4:2052].half()], tile)


def test_tiles_by_rows_and_columns() -> None:
    """Columns are whole tiles, and as many as are on the way."""
    sizes = [8193, 8192, 4096]
    weights = [torch.empty(N, 9216, dtype=fp8.DTYPE) for N in sizes]
    assert len({triton_row_fp8.tile(N, 2560) for N in sizes}) == 3
    for K, served in (
        (500, []),
        (512, [8193, 8192]),
        (1024, [8193, 8192]),
        (2048, sizes),
        (2560, [8193, 8192]),
    ):
        x = torch.empty(K, dtype=torch.bfloat16)
        found = [
            N
            for N, weight in zip(sizes, weights, strict=True)
            if triton_row_fp8.serves(x, [weight[:, :K]], triton_row_fp8.tile(N, K))
        ]
        assert found == served
    # Gate and up of many rows, unless there were too many tiles.
    for N, K, unrolled in ((8193, 8192, True), (8193, 9216, False), (8192, 4096, False)):
        tile = triton_row_fp8.tile(N, K, gated=True)
        assert bool(tile.steps) == unrolled
        assert triton_row_fp8.serves(torch.empty(K).half(), [weights[0][:, :K]], tile)


@pytest.mark.parametrize("shape", [(48, 80), (37, 96), (130, 1040), (16, 2048)])
@pytest.mark.parametrize("rows", [2, 7, 16, 33, 64, 100])
def test_a_few_rows(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight, scale, values = matrix(*shape)
    x = torch.randn(rows, 1, shape[1]).half()
    out = triton_row.linear(x, weight, None, scale=scale)
    assert out.shape == (rows, 1, shape[0])
    assert out.dtype == torch.float16
    right = linear(x.float(), values)
    assert (out.float() - right).norm() <= 1e-3 * right.norm()


@pytest.mark.parametrize("rows", [3, 40])
def test_splits_add_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_few, "_processors", lambda device: 8)
    assert triton_few._splits(2, 2100, torch.device("cpu")) == (4, 640)
    weight, scale, values = matrix(100, 2100)
    x = torch.randn(rows, 2100).half()
    right = linear(x.float(), values)
    assert (
        triton_row.linear(x, weight, None, scale=scale).float() - right
    ).norm() <= 1e-3 * right.norm()


@pytest.mark.parametrize("kind", ["plain", "biased", "fp8"])
@pytest.mark.parametrize("processors", [1, 8])
def test_a_few_rows_times_slices_of_several_matrices(
    kind: str, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one launch, or in two where the columns are split."""
    torch.manual_seed(0)
    monkeypatch.setattr(triton_few, "_processors", lambda device: processors)
    x = torch.randn(5, 1, 1200).half()
    parts = [(3, 90, 0), (0, 64, 7), (1, 20, 16)]
    made = [matrix(N, 1300) for N in (130, 64, 21)]
    biases = [torch.randn(len(each)).half() if kind == "biased" else None for each, _, _ in made]
    scales = [scale if kind == "fp8" else None for _, scale, _ in made]
    weights = [weight if kind == "fp8" else values.half() for weight, _, values in made]
    outs = triton_row.linears(
        x, weights, biases, [number for part in parts for number in part], scales
    )
    for out, values, bias, (first, size, column) in zip(
        outs, (values for _, _, values in made), biases, parts, strict=True
    ):
        rows = slice(first, first + size)
        right = linear(x.float(), values[rows, column : column + 1200])
        right += 0 if bias is None else bias[rows].float()
        assert (out.float() - right).norm() <= 1e-3 * right.norm()


def test_a_few_rows_of_matrices_that_differ() -> None:
    """A matrix in fp8 and one with a bias each take a launch of their own, many rows torch."""
    torch.manual_seed(0)
    weight, scale, values = matrix(48, 64)
    plain, bias = torch.randn(32, 64).half(), torch.randn(32).half()
    for rows in (2, 70, 300):
        x = torch.randn(rows, 1, 64).half()
        parts = [0, 48, 0, 0, 32, 0]
        first, second = triton_row.linears(x, [weight, plain], [None, bias], parts, [scale, None])
        right = linear(x.float(), values)
        assert (first.float() - right).norm() <= 1e-3 * right.norm()
        torch.testing.assert_close(second, linear(x, plain, bias), atol=2e-2, rtol=1e-3)


def test_parts_of_a_matrix() -> None:
    """Rows and columns of a weight, and rows of the input that are not next to each other."""
    weight, scale, values = matrix(96, 128)
    x = torch.randn(5, 2, 80).half()[:, 1]
    part = slice(16, 64), slice(32, 112)
    out = triton_row.linear(x, weight[part], None, scale=scale[part[0]])
    right = linear(x.float(), values[part])
    assert (out.float() - right).norm() <= 1e-3 * right.norm()


def test_more_rows_than_the_kernel_takes() -> None:
    weight, scale, values = matrix(16, 32)
    x = torch.randn(triton_few.MOST[1] + 1, 1, 32).half()
    right = linear(x.float(), values)
    out = triton_row.linear(x, weight, None, scale=scale).float()
    assert (out - right).norm() <= 1e-3 * right.norm()


def test_a_compiled_step_has_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """gate and up in one launch, then down."""
    layer: Any = quantized("llama").model.layers[1].mlp
    x = torch.randn(1, 1, layer.gate_proj.in_features)
    expected = layer(x)
    launches = counted_launches(monkeypatch)
    for module in (layer.gate_proj, layer.up_proj, layer.down_proj):
        assert isinstance(module, Fp8Linear)
        module.has_kernels = True
    passes = compiled._Passes("fuse linears", compiled._fuse_linears)
    fast = torch.compile(layer, fullgraph=True, options={compiled._PASSES: passes})
    with torch.no_grad(), fresh_code():
        torch.testing.assert_close(fast(x), expected, atol=1e-4, rtol=1e-4)
    assert launches == [2, 1]
