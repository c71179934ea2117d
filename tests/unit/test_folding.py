"""Gates and residuals in the launches of a single row, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

from star_attention.distributed import SoloComm
from star_attention.hf.execution import compiled, graphs, hook, sums
from star_attention.hf.execution.handle import ModelHandle
from star_attention.linear import fp8
from tests import compiling
from tests.compiling import fresh_code, of_weights
from tests.engines import engine, ids
from tests.families import build
from tests.recorders import few_runs, with_graphs

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.linear import folding, triton_folded, triton_row, triton_row_fp8  # noqa: E402
from star_attention.linear.triton_experts import ACTIVATIONS  # noqa: E402


class Row(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return triton_row.linear(input, self.weight, self.bias)


def traced(
    function: Callable[..., Any], *args: Tensor, mode: Any = "real", fuse: bool = True
) -> torch.fx.GraphModule:
    """Return the graph that is folded."""
    module = compiling.traced(function, *args, mode=mode)
    if fuse:
        triton_row.fuse_linears(module.graph)
    module.recompile()
    return module


def folded(module: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    """Fold, and return of each launch: matrices, if it has a residual, gate."""
    folding.fold(module.graph)
    module.graph.lint()
    module.recompile()
    return launches_of(module)


def launches_of(module: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    found = []
    for node in module.graph.nodes:
        if node.target == torch.ops.star_attention.linears.default:
            found.append((len(node.args[1]), False, ""))
        elif node.target == torch.ops.star_attention.folded_linears.default:
            residual, activation = node.args[5:]
            found.append((len(node.args[1]), residual is not None, activation))
    return found


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("fp32", "gelu"),
        ("fp16", "silu"),
        ("fp8", "silu"),
        ("words", "gelu_tanh"),
        ("unrolled", "silu"),
    ],
)
def test_gated_products(kind: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch; parts of matrices, of an uneven number of columns and in whole words."""
    torch.manual_seed(0)
    in_words = kind in ("words", "unrolled")
    K, N = (2304 if kind == "unrolled" else 2048 if in_words else 1100), 21
    if kind == "unrolled":
        monkeypatch.setattr(triton_row_fp8, "_MANY", N)
    dtype = torch.float32 if kind in ("fp32", "fp8") else torch.float16
    x = torch.randn(1, 1, K).to(dtype) * 3
    made = [torch.randn(N + 4, K + 4) * K**-0.5 for _ in "ab"]
    scales: list[Tensor | None] = [None, None]
    weights, values = [each.to(dtype) for each in made], [each.to(dtype).float() for each in made]
    if kind == "fp8" or in_words:
        quantized = [fp8.quantize(each) for each in made]
        weights = [q for q, _ in quantized]
        scales = [scale[:, 0].contiguous() for _, scale in quantized]
        values = [q.float() * scale for q, scale in quantized]
    biases = [None, torch.randn(N + 4).to(dtype)]
    parts = [1, N, 4, 3, N, 4]
    tile = triton_row_fp8.tile(2 * N, K, gated=True)
    assert bool(tile.steps) == (kind == "unrolled")
    assert triton_row_fp8.serves(x, [weights[0][1:, 4:]], tile) == in_words
    rights = [
        functional.linear(x.float(), value[first : first + N, 4:])
        for value, first in zip(values, (1, 3), strict=True)
    ]
    rights[1] += biases[1][3 : 3 + N].float()  # type: ignore[index]
    right = ACTIVATIONS[activation](rights[0]) * rights[1]
    out = triton_folded.folded_linears(x, weights, biases, parts, scales, None, activation)
    assert out.shape == (1, 1, N)
    assert out.dtype == dtype
    torch.testing.assert_close(out, right.to(dtype), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["fp32", "fp8"])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_residual_is_added_before_rounding(kind: str, rows: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(1, 1, 96).half(), torch.randn(1, 1, rows).half()
    weight = torch.randn(rows, 96)
    q, scale = fp8.quantize(weight) if kind == "fp8" else (weight.half(), torch.ones(rows, 1))
    out = triton_folded.folded_linears(
        x, [q], [None], [0, rows, 0], [scale[:, 0].contiguous() if kind == "fp8" else None],
        residual, "",
    )  # fmt: skip
    right = functional.linear(x.double(), q.double() * scale) + residual
    torch.testing.assert_close(out, right.half(), atol=1e-6, rtol=torch.finfo(torch.half).eps)


QKV, PLAIN, ADDED = (3, False, ""), (1, False, ""), (1, True, "")


@pytest.mark.parametrize(
    ("family", "launches"),
    [
        ("llama", [QKV, ADDED, (2, False, "silu"), ADDED]),
        # Norms follow its products, and their sums with the residual follow those.
        pytest.param(
            "gemma2",
            [QKV, PLAIN, (2, False, "gelu_tanh"), PLAIN],
            marks=pytest.mark.slow,
        ),
        # Its products are multiplied with a number before the sum.
        pytest.param("granite", [QKV, PLAIN, (2, False, "silu"), PLAIN], marks=pytest.mark.slow),
        # Two products are added to one residual.
        ("cohere", [QKV, (2, False, "silu"), ADDED, ADDED]),
    ],
)
def test_layers_of_families(family: str, launches: list[tuple[Any, ...]]) -> None:
    torch.manual_seed(0)
    dtype = torch.float16
    model: Any = build(family).to(dtype)
    layer = model.model.layers[0]
    for name, weight in layer.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight)
    hidden = layer.mlp.down_proj.out_features
    x = torch.randn(1, 1, hidden).to(dtype)
    rotary = model.model.rotary_emb(x, torch.tensor([[7]]))
    weights = dict(layer.named_parameters())
    forward = of_weights(layer, rotary)

    with torch.no_grad():
        expected = forward(x, *weights.values())
        for module in layer.modules():
            if type(module) is nn.Linear:
                module.__class__ = Row
        module = traced(forward, x, *weights.values())
        assert folded(module) == launches
        out = module(x, *weights.values())
    eps = torch.finfo(dtype).eps
    assert (out.float() - expected.float()).norm() <= 4 * eps * expected.float().norm()


@pytest.mark.slow
def test_steps_of_an_engine_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers with our attention in them, in the stand-in for a CUDA graph."""
    few_runs(monkeypatch)
    monkeypatch.setattr(graphs, "BUCKETS", (1, 4, 8))
    monkeypatch.setattr(compiled, "triton_works", lambda device: True)
    launches: list[int] = []
    fold = folding.fold

    def counted(graph: torch.fx.Graph) -> None:
        fold(graph)
        op = torch.ops.star_attention.folded_linears.default
        launches.append(sum(node.target == op for node in graph.nodes))

    monkeypatch.setattr(folding, "fold", counted)
    replies = []
    with fresh_code():
        for compiling in (True, False):
            star = engine(
                "llama", block_size=24, anchor_size=10, tokens_per_forward=48, compile=compiling
            )
            if compiling:
                with_graphs(star)
            replies.append(
                star.generate(
                    star.encode(ids(101)),
                    ids(5),
                    max_new_tokens=3,
                    ignore_eos=True,
                    return_logits=True,
                )
            )
    # The norm after the layers is compiled, too, and has none.
    assert [count for count in launches if count] == [3]
    assert replies[0].token_ids == replies[1].token_ids
    torch.testing.assert_close(replies[0].logits, replies[1].logits, atol=1e-4, rtol=1e-4)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return triton_row.linear(x, weight, None)


def _other_activation(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return torch.sigmoid(1.702 * _linear(x, a)) * _linear(x, b)


def _gate_used_twice(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    gate = _linear(x, a)
    return functional.silu(gate) * _linear(x, b), gate


def _both_of_gate(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    gate = _linear(x, a)
    return functional.silu(gate) * gate * _linear(x, b)


def _clamped_gate(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return functional.silu(_linear(x, a).clamp(max=16)) * _linear(x, b)


def _clamped_activation(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return functional.silu(_linear(x, a)).clamp(max=16) * _linear(x, b)


def _clamped_far_away(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return functional.silu(_linear(x, a)).clamp(max=3e4) * _linear(x, b)


def _gate_of_integers(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return functional.silu(_linear(x, a).int().float()) * _linear(x, b)


def _gate_in_fp8(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return functional.silu(_linear(x, a).to(fp8.DTYPE).float()) * _linear(x, b)


def _sum_over_ranks(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    """Each rank would add the residual. This is `sums.sum_over` in compiled layers."""
    return x + sums._sum_op(_linear(x, a), "cp", sums._NO_SHARD)


def _gate_of_ranks(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    gate = sums._sum_op(_linear(x, a), "cp", sums._NO_SHARD)
    return functional.silu(gate) * _linear(x, b)


def _product_used_twice(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    out = _linear(x, a)
    return x + out, out


def _broadcast_sum(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return _linear(x, a) + w


def _sum_of_other_precision(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return _linear(x, a) + x.double()


def _scaled_sum(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    return torch.add(x, _linear(x, a), alpha=2)


def _several_rows(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    x = x.repeat(2, 1, 1)
    return x + _linear(x * w, a)


@pytest.mark.parametrize(
    "function",
    [
        _other_activation,
        _gate_used_twice,
        _both_of_gate,
        _clamped_gate,
        _clamped_activation,
        _clamped_far_away,
        _gate_of_integers,
        _gate_in_fp8,
        _sum_over_ranks,
        _gate_of_ranks,
        _product_used_twice,
        _broadcast_sum,
        _sum_of_other_precision,
        _scaled_sum,
        _several_rows,
    ],
)
def test_what_is_not_recognized_stays(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    args = torch.randn(1, 1, 48), torch.rand(48), torch.randn(48, 48), torch.randn(48, 48)
    # Not run: a sum over ranks needs a forward.
    module = traced(function, *args, mode="fake")
    before = module.code
    assert all(each[1:] == (False, "") for each in folded(module))
    assert module.code == before


def test_gates_in_either_order_of_matrices() -> None:
    """The matrix of the gate may be the second one, with its bias and its part."""
    torch.manual_seed(0)
    x, up, gate = torch.randn(1, 1, 48), torch.randn(30, 48), torch.randn(30, 48)
    bias = torch.randn(30)

    def forward(x: Tensor, up: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        y = triton_row.linear(x, up, None, rows=(2, 20))
        return y * functional.gelu(triton_row.linear(x, gate, bias, rows=(5, 23)))

    module = traced(forward, x, up, gate, bias)
    assert folded(module) == [(2, False, "gelu")]
    right = functional.gelu(functional.linear(x, gate, bias)[..., 5:23])
    right = right * functional.linear(x, up)[..., 2:20]
    torch.testing.assert_close(module(x, up, gate, bias), right, atol=1e-5, rtol=1e-4)


def _residual_and_gate(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    x = x + _linear(x, w)
    return functional.silu(_linear(x, a)) * _linear(x, b)


def test_passes_of_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one token and of several rows are folded; forwards of many tokens are not."""
    monkeypatch.setattr(compiled, "triton_works", lambda device: True)
    layers = compiled.CompiledLayers(ModelHandle(build("llama")))
    for mode, launches in (
        (compiled.STEP, [ADDED, (2, False, "silu")]),
        (compiled.ROWS, [ADDED, (2, False, "silu")]),
        (compiled.FULL, [PLAIN, PLAIN, PLAIN]),
        (compiled.QUERY, [PLAIN, PLAIN, PLAIN]),
    ):
        module = traced(
            _residual_and_gate, torch.randn(1, 1, 48), *torch.randn(3, 48, 48), fuse=False
        )
        layers._options[mode][compiled._PASSES](module.graph)
        assert launches_of(module) == launches


@pytest.mark.parametrize(("axis", "lengths"), [(None, [1]), (0, [5, 3, 8])])
def test_the_ends_of_a_step_are_compiled(
    axis: int | None, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final norm and the rotary embeddings of new tokens run as compiled code, once for all
    numbers of rows; others' do not."""
    model = build("llama")
    ends = {"norm": model.model.norm, "rotary_emb": model.model.rotary_emb}
    calls: list[str] = []
    for name, module in ends.items():

        def counted(
            *args: Any, name: str = name, stock: Any = module.forward, **kwargs: Any
        ) -> Any:
            if not torch.compiler.is_compiling():
                calls.append(name)
            return stock(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counted)
    stock = dict(norm=ends["norm"].forward, rotary_emb=ends["rotary_emb"].forward)
    ends_of = {name: compiled._compiled_end(module, axis, {}) for name, module in ends.items()}
    for name, end in ends_of.items():
        made = counters["stats"]["unique_graphs"]
        for length in lengths:
            hidden = torch.randn(length, 1, model.config.hidden_size)
            positions = torch.arange(70, 70 + length)[:, None]
            inputs = (hidden,) if name == "norm" else (hidden, positions)
            expected = stock[name](*inputs)
            calls.clear()
            end(*inputs)
            assert calls == [name]  # outside of our forwards
            monkeypatch.setattr(hook, "in_our_forward", lambda: True)
            monkeypatch.setattr(hook, "comm_of_forward", SoloComm)
            end(*inputs)
            calls.clear()
            torch.testing.assert_close(end(*inputs), expected)
            assert calls == []
            monkeypatch.setattr(hook, "in_our_forward", lambda: False)
        assert counters["stats"]["unique_graphs"] == made + 1


def test_another_default_device() -> None:
    """Activations are recognized where tensors without a device cannot be read."""
    module = traced(_residual_and_gate, torch.randn(1, 1, 48), *torch.randn(3, 48, 48))
    with torch.device("meta"):
        assert folded(module) == [ADDED, (2, False, "silu")]
