"""Experts of a single row in Triton's interpreter; tests/gpu/test_row_experts_cuda.py has GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from star_attention.hf.loading.plain_experts import are_plain_experts
from tests.engines import tiny
from tests.tiers import in_turn

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.hf.execution.row_experts import row_class  # noqa: E402
from star_attention.linear.triton_experts import ACTIVATIONS, experts  # noqa: E402


def experts_of(family: str) -> Any:
    """Return the experts of a small model's last layer."""
    torch.manual_seed(0)
    found = [m for m in tiny(family).modules() if type(m).__name__.endswith("Experts")]
    return found[-1]


# Sizes in one tile with every activation; in several, which take seconds, with one.
SIZES = [(1, 6, 40, 70), (3, 2, 530, 16), (1, 1, 16, 1100)]


@pytest.mark.parametrize(
    ("tokens", "chosen", "width", "hidden", "activation"),
    in_turn(
        0, SIZES, list(ACTIVATIONS), quick=lambda *case: case[:4] == SIZES[0] or case[4] == "silu"
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
    out = experts(x, gate_up, down, index, share, activation)
    torch.testing.assert_close(out.double(), right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


def test_half_precision() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(1, 64), torch.randn(4, 48, 64) / 8, torch.randn(4, 64, 24) / 5
    index, share = torch.tensor([[3, 1]]), torch.tensor([[0.7, 0.3]])
    right = experts(x, gate_up, down, index, share, "silu")
    out = experts(x.half(), gate_up.half(), down.half(), index, share, "silu")
    assert out.dtype == torch.float16
    assert (out.float() - right).norm() < 4e-3 * right.norm()


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
