"""What MLA computes of a single token before its attention, left to our kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

from star_attention.hf.execution import compiled, graphs, hook, latent_token
from star_attention.hf.execution.complex_products import multiply_reals
from tests.compiling import fresh_code
from tests.engines import engine, ids
from tests.recorders import few_runs, with_graphs

H, N, P, C, V = 3, 6, 4, 20, 5
PLAIN, OURS = (
    torch.ops.star_attention.layer.default,
    torch.ops.star_attention.latent_layer.default,
)
Parts = tuple[Tensor, Tensor, Tensor]


def _rotated(q: Tensor, r: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    plain, turned = torch.split(q, [N, P], dim=-1)
    turned, r = apply_rotary_emb(turned, r, angles)
    return torch.cat((plain, turned), dim=-1), r


def _norm(c: Tensor, weight: Tensor) -> Tensor:
    wide = c.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).half()


def _deepseek(q: Tensor, c: Tensor, r: Tensor, angles: Tensor, weight: Tensor) -> Parts:
    q, r = _rotated(q, r, angles)
    return q, _norm(c, weight), r


def _norm_alone(q: Tensor, c: Tensor, r: Tensor, angles: Tensor, weight: Tensor) -> Parts:
    return q * 2, _norm(c, weight), r


def _rotation_alone(q: Tensor, c: Tensor, r: Tensor, angles: Tensor, weight: Tensor) -> Parts:
    q, r = _rotated(q, r, angles)
    return q, c * weight, r


def _other_key(q: Tensor, c: Tensor, r: Tensor, angles: Tensor, weight: Tensor) -> Parts:
    """The key turns the other way."""
    q, _ = _rotated(q, r, angles)
    return q, c, _rotated(q, r, angles.conj())[1]


def _other_part(q: Tensor, c: Tensor, r: Tensor, angles: Tensor, weight: Tensor) -> Parts:
    """What is not rotated is not the query's."""
    turned, r = _rotated(q, r, angles)
    return torch.cat((q[..., :N] * 2, turned[..., N:]), -1), c * weight, r


def _scaled(q: Tensor, c: Tensor, r: Tensor, angles: Tensor, weight: Tensor) -> Parts:
    q, r = _rotated(q, r, angles)
    return q, 2 * _norm(c, weight), 2 * r


def traced(function: Callable[..., Parts], key_size: int = C) -> torch.fx.GraphModule:
    """Return the graph of a layer for one token."""
    made: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        made.append(module)
        return module.forward

    def layer(q: Tensor, kv: Tensor, angles: Tensor, weight: Tensor) -> Tensor:
        c, r = torch.split(kv, [key_size, P], dim=-1)
        heads = q.view(1, 1, H, N + P).transpose(1, 2)
        heads, c, r = function(heads, c.view(1, 1, 1, -1), r.view(1, 1, 1, P), angles, weight)
        return hook._layer_op(heads, c, r, V, 0.25, None, None, None)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
    angles = torch.polar(torch.ones(1, 1, P // 2), torch.randn(1, 1, P // 2))
    weight = torch.nn.Parameter(torch.randn(key_size).half())
    inputs = torch.randn(1, 1, H * (N + P)).half(), torch.randn(1, 1, key_size + P).half()
    with torch.no_grad(), pytest.raises(RuntimeError, match="outside of its forward"):
        torch.compile(layer, fullgraph=True, backend=backend)(*inputs, angles, weight)
    multiply_reals(made[0].graph)
    return made[0]


@pytest.mark.parametrize(
    ("function", "has_norm", "has_rotation"),
    [
        (_deepseek, True, True),
        (_norm_alone, True, False),
        (_rotation_alone, False, True),
    ],
)
def test_what_the_kernel_computes(
    function: Callable[..., Parts],
    has_norm: bool,
    has_rotation: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operation gets the parts, and computes of them what the layer did."""
    module = traced(function)
    before = attended(module, monkeypatch)
    latent_token.leave_to_kernels(module.graph)
    module.graph.lint()
    (node,) = module.graph.find_nodes(op="call_function", target=OURS)
    assert not module.graph.find_nodes(op="call_function", target=PLAIN)
    assert (node.args[4] is not None, node.args[6] is not None) == (has_norm, has_rotation)
    assert node.args[8:] == (has_rotation, 0.25, None, None, None)
    # Nothing of them is left in the layer.
    targets = {each.target for each in module.graph.nodes}
    assert torch.ops.aten.rsqrt.default not in targets
    assert torch.ops.aten.cat.default not in targets
    after = attended(module, monkeypatch)
    assert after[3:] == before[3:]
    for mine, right in zip(after[:3], before[:3], strict=True):
        torch.testing.assert_close(mine, right, atol=4e-3, rtol=4e-3)


def attended(module: torch.fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the arguments with which a layer's attention is called."""
    torch.manual_seed(0)
    inputs = [
        torch.polar(torch.ones(value.shape), torch.randn(value.shape))
        if value.is_complex()
        else torch.randn(value.shape).to(value.dtype)
        for node in module.graph.find_nodes(op="placeholder")
        for value in [node.meta["val"]]
    ]
    seen: list[Any] = []

    def layer(*args: Any) -> Tensor:
        seen.append(args)
        return torch.zeros(1, 1, H, V).half()

    class Run(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return super().call_function(layer if target == PLAIN else target, args, kwargs)

    monkeypatch.setattr(latent_token, "_layer", layer)
    try:
        with torch.no_grad():
            Run(module).run(*inputs)
    finally:
        monkeypatch.undo()
    return seen[0]


@pytest.mark.parametrize("function", [_other_key, _other_part, _scaled])
def test_what_is_not_recognized_stays(function: Callable[..., Parts]) -> None:
    module = traced(function)
    before = list(module.graph.nodes)
    latent_token.leave_to_kernels(module.graph)
    assert list(module.graph.nodes) == before


def test_expanded_keys_stay() -> None:
    """A single head's keys that are as long as queries are no compressed ones."""
    module = traced(lambda q, c, r, angles, weight: (q * 2, c.square(), r), key_size=N + P)
    before = list(module.graph.nodes)
    latent_token.leave_to_kernels(module.graph)
    assert list(module.graph.nodes) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_steps_of_an_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers in the stand-in for a CUDA graph."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's kernels do not run in its interpreter here")
    few_runs(monkeypatch)
    monkeypatch.setattr(graphs, "BUCKETS", (1, 4, 8))
    monkeypatch.setattr(compiled, "triton_works", lambda device: True)
    found: list[tuple[bool, bool]] = []
    leave = latent_token.leave_to_kernels

    def counted(graph: torch.fx.Graph) -> None:
        leave(graph)
        for node in graph.find_nodes(op="call_function", target=OURS):
            found.append((node.args[4] is not None, node.args[6] is not None))

    monkeypatch.setattr(latent_token, "leave_to_kernels", counted)
    torch._dynamo.reset()
    replies = []
    with fresh_code():
        for compiling in (True, False):
            star = engine(
                name, block_size=24, anchor_size=10, tokens_per_forward=48, compile=compiling
            )
            if compiling:
                with_graphs(star)
            context = star.encode(ids(101))
            length: dict[str, Any] = dict(max_new_tokens=3, ignore_eos=True, return_logits=True)
            replies.append(star.generate(context, ids(5), **length))
    torch._dynamo.reset()
    # V3's rotary embeddings also order a head's elements anew, which the kernel does not.
    assert set(found) == {(True, name == "deepseek_v2")}
    mine, plain = replies
    assert mine.token_ids == plain.token_ids
    torch.testing.assert_close(mine.logits, plain.logits, atol=1e-4, rtol=1e-4)
