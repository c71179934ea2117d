"""Experts of a single row in Triton's interpreter; tests/gpu/test_row_experts_cuda.py has GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from star_attention.hf.loading.plain_experts import are_plain_experts
from tests.compiling import traced
from tests.families import build
from tests.tiers import in_turn

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.hf.execution.row_experts import row_class  # noqa: E402
from star_attention.linear import folding, shared_experts, triton_row  # noqa: E402
from star_attention.linear.triton_experts import ACTIVATIONS, experts  # noqa: E402

OPS = torch.ops.star_attention


def experts_of(family: str) -> Any:
    """Return the experts of a small model's last layer."""
    torch.manual_seed(0)
    found = [m for m in build(family).modules() if type(m).__name__.endswith("Experts")]
    return found[-1]


# Sizes in one tile with every activation; in several, which take seconds, with one.
SIZES = [(1, 6, 40, 70), (2, 2, 260, 16), (1, 1, 16, 1100), (2, 2, 530, 16)]


@pytest.mark.parametrize(
    ("tokens", "chosen", "width", "hidden", "activation"),
    in_turn(
        0,
        SIZES,
        list(ACTIVATIONS),
        quick=lambda *case: case[:4] == SIZES[0] or (case[:4] != SIZES[3] and case[4] == "silu"),
    ),
)
def test_few_tokens(tokens: int, chosen: int, width: int, hidden: int, activation: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden)
    gate_up = torch.randn(7, 2 * width, hidden) / hidden**0.5
    down = torch.randn(7, hidden, width)
    index = torch.stack([torch.randperm(7)[:chosen] for _ in range(tokens)])
    share = torch.rand(tokens, chosen)
    right = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for expert, weight in zip(index[token], share[token], strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            inner = ACTIVATIONS[activation](gate) * up
            right[token] += weight * (down[expert].double() @ inner)
    out = experts(x, gate_up, down, index, share, activation, [], None)
    torch.testing.assert_close(out.double(), right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


def test_half_precision() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(1, 64), torch.randn(4, 48, 64) / 8, torch.randn(4, 64, 24) / 5
    index, share = torch.tensor([[3, 1]]), torch.tensor([[0.7, 0.3]])
    right = experts(x, gate_up, down, index, share, "silu", [], None)
    out = experts(x.half(), gate_up.half(), down.half(), index, share, "silu", [], None)
    assert out.dtype == torch.float16
    assert (out.float() - right).norm() < 4e-3 * right.norm()


@pytest.mark.parametrize(
    ("tokens", "width", "shared_width", "hidden"),
    [
        (2, 24, 40, 70),
        (1, 260, 520, 16),
        pytest.param(1, 530, 1040, 16, marks=pytest.mark.slow),
    ],
)
def test_a_shared_expert_and_a_residual(
    tokens: int, width: int, shared_width: int, hidden: int
) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(tokens, hidden), torch.randn(1, tokens, hidden)
    gate_up, down = torch.randn(4, 2 * width, hidden) / 8, torch.randn(4, hidden, width)
    index, share = torch.tensor([[3, 1], [0, 3]])[:tokens], torch.rand(tokens, 2)
    # Rows of larger matrices.
    gate, up = (torch.randn(shared_width, hidden + 3)[:, :hidden] / 8 for _ in range(2))
    second = torch.randn(hidden, shared_width + 5)[:, :shared_width]
    inner = nn.functional.silu(x @ gate.T) * (x @ up.T)
    right = experts(x, gate_up, down, index, share, "silu", [], None)
    right += inner @ second.T + residual[0]
    out = experts(x, gate_up, down, index, share, "silu", [gate, up, second], residual)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "experts_alone", "launches"),
    [
        ("shared", False, 0),
        ("other activation", True, 2),
        ("other input", True, 2),
        ("bias", True, 2),
        ("no shared expert", True, 0),
    ],
)
def test_what_is_added_to_experts(kind: str, experts_alone: bool, launches: int) -> None:
    """Launches of products that are left, and if a shared expert is not part of the others'."""
    torch.manual_seed(0)
    hidden, width = 48, 24
    x, residual = torch.randn(1, 1, hidden), torch.randn(1, 1, hidden)
    weights = [torch.randn(4, 2 * width, hidden) / 7, torch.randn(4, hidden, width) / 5]
    chosen = [torch.tensor([[3, 1]]), torch.rand(1, 2)]
    shared = [torch.randn(*shape) / 6 for shape in ((40, hidden), (40, hidden), (hidden, 40))]
    bias = [torch.randn(40)] if kind == "bias" else []
    activation = "gelu" if kind == "other activation" else "silu"

    def layer(x: Tensor, residual: Tensor, *given: Tensor) -> Tensor:
        up, down, index, share, gate, other, second, *rest = given
        mixed = experts(x.view(1, -1), up, down, index, share, "silu", [], None).view(x.shape)
        if kind == "no shared expert":
            return residual + mixed
        of = residual if kind == "other input" else x
        inner = ACTIVATIONS[activation](triton_row.linear(of, gate, rest[0] if rest else None))
        inner = inner * triton_row.linear(of, other, None)
        return residual + (mixed + triton_row.linear(inner, second, None))

    inputs = x, residual, *weights, *chosen, *shared, *bias
    module = traced(layer, *inputs)
    for each in (triton_row.fuse_linears, folding.fold, shared_experts.mix):
        each(module.graph)
    module.graph.lint()
    module.recompile()
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    (node,) = (node for node in nodes if node.target == OPS.experts.default)
    assert (node.args[6] == []) == experts_alone
    assert (node.args[7] is not None) == (launches == 0)
    folded = [node for node in nodes if node.target == OPS.folded_linears.default]
    assert len(folded) == launches
    torch.testing.assert_close(module(*inputs), layer(*inputs))


@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral", "qwen3_moe", "olmoe"])
def test_compiled_experts_of_models(family: str) -> None:
    """One token by the kernel, several by the stock forward, which is also the reference."""
    stock = experts_of(family)
    hidden = stock.down_proj.shape[1]
    index = torch.tensor([[1, 3], [2, 0]])
    x, share = torch.randn(2, hidden), torch.rand(2, 2)
    with torch.no_grad():
        right = stock(x, index, share)
        stock.__class__ = row_class(stock)
        calls: list[int] = []

        def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
            op = torch.ops.star_attention.experts.default
            calls.append(len(graph.graph.find_nodes(op="call_function", target=op)))
            return graph

        compiled = torch.compile(stock, backend=count)
        torch.testing.assert_close(compiled(x[:1], index[:1], share[:1]), right[:1])
        assert sum(calls) == 1
        # Nothing else takes the kernel: many tokens, or code that is not compiled.
        torch.testing.assert_close(stock(x, index, share), right)


class Limited(nn.Module):
    """Experts whose gate has a limit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 16, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 8))
        self.limit = 7.0

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return nn.functional.silu(gate.clamp(max=self.limit)) * up

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden_states


@pytest.mark.parametrize(
    "name", ["is_transposed", "has_post_expert_norm", "forward", "bias", "hook"]
)
def test_experts_of_another_form_are_not_plain(name: str) -> None:
    module = Limited()
    assert are_plain_experts(module)
    if name == "hook":
        module.register_forward_hook(lambda *_: None)
    else:
        bias = nn.Parameter(torch.zeros(2))
        setattr(module, name, dict(forward=module.forward, bias=bias).get(name, True))
    assert not are_plain_experts(module)


def test_other_experts_are_left_alone() -> None:
    module = Limited()
    assert row_class(module) is None
    module.limit = float("inf")
    assert row_class(module) is not None
    module.down_proj = nn.Parameter(module.down_proj.detach().half())
    assert row_class(module) is None
    assert row_class(experts_of("gpt_oss")) is None
