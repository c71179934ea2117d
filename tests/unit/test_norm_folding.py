"""Norms of a single row and the residuals before them, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from star_attention.hf.execution import compiled
from star_attention.hf.execution.handle import ModelHandle
from tests.compiling import half_layer, of_weights
from tests.families import build
from tests.row_norms import PARTS, check, norms_of
from tests.unit.test_folding import Row, traced

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.linear import folding, norm_folding, triton_norm, triton_row  # noqa: E402


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_and_what_follows(dtype: torch.dtype, parts: tuple[bool, bool, bool]) -> None:
    for seed, (rows, size) in enumerate(((1, 2), (7, 48), (1, 1000), (3, 1002), (2, 4100))):
        row = torch.randn(rows, 1, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
        norms = norms_of(row, parts, seed)
        check(norms.after(row), row, norms)


def test_rows_that_are_parts_of_tensors() -> None:
    """Their words may begin between those of memory, and their numbers may not be neighbours."""
    numbers = torch.randn(200, generator=torch.Generator().manual_seed(0)).half()
    for row in (numbers[1:99].view(1, -1), numbers[::2].view(1, -1)):
        norms = norms_of(row, (False, True, True))
        check(norms.after(row), row, norms)
        shifted = norms._replace(pre=numbers[3 : 3 + row.shape[-1]])
        check(shifted.after(row), row, shifted)


def test_rows_that_there_is_a_kernel_for() -> None:
    assert triton_norm.serves(torch.empty(1, 16384, dtype=torch.bfloat16))
    assert not triton_norm.serves(torch.empty(1, 16386, dtype=torch.bfloat16))
    assert not triton_norm.serves(torch.empty(1, 33, dtype=torch.bfloat16))
    assert triton_norm.serves(torch.empty(1, 33))
    assert not triton_norm.serves(torch.empty(1, 32, dtype=torch.float64))


def folded(module: torch.fx.GraphModule, sums: Any = None) -> list[str]:
    """Fold, and return of each launch of ours what it does: see `launch_of`."""
    folding.fold(module.graph)
    norm_folding.fold(module.graph, sums)
    module.graph.lint()
    module.recompile()
    return [launch for node in module.graph.nodes if (launch := launch_of(node))]


def check_stays(function: Callable[..., Any], sums: Any = None) -> None:
    """Check that nothing of a function is folded."""
    torch.manual_seed(0)
    module = traced(function, torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48))
    before = module.code
    assert not any("norm" in launch or "+" in launch for launch in folded(module, sums))
    assert module.code == before


def launch_of(node: torch.fx.Node) -> str:
    """Return the matrices of a product; the norms, the factor and the sums of a norm's launch."""
    name = str(node.target).removeprefix("star_attention.").removesuffix(".default")
    if name in ("linears", "folded_linears"):
        weights: Any = node.args[1]
        return str(len(weights)) + ("+" if len(node.args) > 5 and node.args[5] else "")
    if name == "sum":
        return name
    starts = {
        "row_norms": (1, ""),
        "normed_linear": (5, "1"),
        "sum_norms": (3, "sum"),
        "sum_product_norms": (7, "1 sum"),
    }
    if name not in starts:
        return ""
    at, start = starts[name]
    post, times, residual, pre, *_ = node.args[at:]
    parts = [
        start,
        "post" if post else "",
        f"{times}" if times != 1.0 else "",
        "+" if residual else "",
        "norm" if pre else "",
    ]
    return " ".join(part for part in parts if part)


def check_layer(family: str, launches: list[str], last: type[nn.Linear], sums: Any = None) -> None:
    """Fold a layer, and compare its result.

    Args:
        last: class of the last layers of attention and MLP.
    """
    model, layer, types = half_layer(family)
    x = torch.randn(1, 1, model.config.hidden_size).half()
    rotary = model.model.rotary_emb(x, torch.tensor([[7]]), **types)
    weights = dict(layer.named_parameters())
    forward = of_weights(layer, rotary)

    with torch.no_grad():
        expected = forward(x, *weights.values())
        for name, module in layer.named_modules():
            if type(module) is nn.Linear:
                module.__class__ = last if name.endswith(("o_proj", "down_proj")) else Row
        graph = traced(forward, x, *weights.values())
        assert folded(graph, sums) == launches
        out = graph(x, *weights.values())
    eps = torch.finfo(torch.half).eps
    assert (out.float() - expected.float()).norm() <= 4 * eps * expected.float().norm()


@pytest.mark.parametrize(
    ("family", "launches"),
    [
        ("llama", ["norm", "3", "1+", "norm", "2", "1+"]),
        ("gemma3", ["norm", "3", "1", "post + norm", "2", "1", "post +"]),
        # Its norms of query and key are of the whole row, and feed no product.
        ("olmo2", ["3", "1", "post +", "2", "1", "post +"]),
        # Its last residual is a kernel of Inductor's, as the product before it.
        pytest.param("granite", ["norm", "3", "1", "0.5 + norm", "2", "1"], marks=pytest.mark.slow),
    ],
)
def test_layers_of_families(family: str, launches: list[str]) -> None:
    check_layer(family, launches, Row)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return triton_row.linear(x, weight, None)


def _norm(x: Tensor, weight: Tensor, power: int = 2, eps: float = 1e-5) -> Tensor:
    y = x.float()
    return weight * y * torch.rsqrt(y.pow(power).mean(-1, keepdim=True) + eps)


def _other_power(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return _linear(_norm(x, w, power=4), a)


def _layer_norm(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return _linear(_norm(x - x.mean(-1, keepdim=True), w), a)


def _norm_times_two(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return _linear(_norm(x, w) * 2, a)


def _weight_of_two(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return _linear(_norm(x, w + 2), a)


def _computed_weight(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return _linear(_norm(x, w.sigmoid()), a)


def _several_rows(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return _linear(_norm(x.repeat(2, 1, 1), w), a)


def _computed_row(x: Tensor, w: Tensor, a: Tensor) -> Any:
    """Inductor computes the row and its norm in one launch."""
    return _linear(_norm(x.sin(), w), a)


def _norm_of_no_product(x: Tensor, w: Tensor, a: Tensor) -> Any:
    return _norm(x, w).sin()


@pytest.mark.parametrize(
    "function",
    [
        _other_power,
        _layer_norm,
        _norm_times_two,
        _weight_of_two,
        _computed_weight,
        _several_rows,
        _computed_row,
        _norm_of_no_product,
    ],
)
def test_what_is_not_recognized_stays(function: Callable[..., Any]) -> None:
    check_stays(function)


def test_weights_of_other_precision_stay() -> None:
    args = torch.randn(1, 1, 48).half(), torch.rand(48), torch.randn(48, 48).half()
    module = traced(lambda x, w, a: _linear(_norm(x, w).half(), a), *args)
    assert folded(module) == ["1"]


def _used_norm(x: Tensor, w: Tensor, a: Tensor) -> Any:
    h = x + _linear(x, a)
    y = _norm(h, 1 + w)
    return _linear(y, a), y.sin(), h * 2


def test_results_that_others_need() -> None:
    torch.manual_seed(0)
    args = torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48)
    module = traced(_used_norm, *args)
    expected = module(*args)
    assert folded(module) == ["1+", "norm", "1"]
    torch.testing.assert_close(module(*args), expected, atol=1e-5, rtol=1e-4)


def _viewed_norm(x: Tensor, w: Tensor, a: Tensor) -> Any:
    """As before experts."""
    return _linear(_norm(x, w).view(1, -1), a)


def test_norms_that_are_viewed() -> None:
    torch.manual_seed(0)
    args = torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48)
    module = traced(_viewed_norm, *args)
    expected = module(*args)
    assert folded(module) == ["norm", "1"]
    torch.testing.assert_close(module(*args), expected, atol=1e-5, rtol=1e-4)


def test_passes_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one token and of several rows have norms of ours; those of rows are joined."""
    monkeypatch.setattr(compiled, "triton_works", lambda device: True)
    layers = compiled.CompiledLayers(ModelHandle(build("llama")))
    args = torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48)
    for mode, norms in (
        (compiled.STEP, ["norm"]),
        (compiled.ROWS, ["1 + norm"]),
        (compiled.FULL, []),
    ):
        module = traced(_used_norm, *args, fuse=False)
        layers._options[mode][compiled._PASSES](module.graph)
        launches = [launch_of(node) for node in module.graph.nodes]
        assert [each for each in launches if "norm" in each] == norms
