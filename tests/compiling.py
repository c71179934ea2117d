"""What torch.compile makes of a layer, looked at by tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from tests.families import build


def traced(function: Callable[..., Any], *args: Tensor, mode: Any = "real") -> torch.fx.GraphModule:
    """Return the graph that torch.compile's passes see: operations are decomposed."""
    decomposed = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode=mode)
    module = decomposed(*args)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def half_layer(family: str) -> tuple[Any, Any, dict[str, str]]:
    """Return a model of a family in half precision, and its first layer with norms of any weights.

    The last result is what the model's rotary embeddings take beside states and positions.
    """
    torch.manual_seed(0)
    model: Any = build(family).half()
    layer = model.model.layers[0]
    for name, weight in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight)
    return model, layer, {} if family != "gemma3" else dict(layer_type="sliding_attention")


def of_weights(layer: torch.nn.Module, rotary: Any) -> Callable[..., Tensor]:
    """Return a layer's forward as a function of hidden states and of all its parameters."""
    names = [name for name, _ in layer.named_parameters()]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        call = torch.func.functional_call(
            layer, named, (x,), dict(position_embeddings=rotary, attention_mask=None)
        )
        return call if isinstance(call, Tensor) else call[0]

    return forward


def of_any_rows(
    function: Callable[..., Tensor], *passes: Callable[[torch.fx.Graph], None]
) -> tuple[Callable[..., Tensor], list[torch.fx.GraphModule]]:
    """Return a function compiled for any number of rows, and the graphs that passes have changed.

    Args:
        function: of tensors with a row each first, and of weights, which have no axis as long.
        passes: what changes the graph that torch.compile's passes see.
    """
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            # Not while torch compiles: then tensors have no numbers, which passes compare.
            if module not in graphs:
                graphs.append(module)
                for each in passes:
                    each(module.graph)
                module.graph.lint()
                module.recompile()
            return module(*args)

        return run

    # Not what it has kept of other functions.
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
    compiled = torch.compile(function, fullgraph=True, backend=backend)

    def call(x: Tensor, *args: Tensor) -> Tensor:
        for each in (x, *args):
            if each.dim() > 0 and len(each) == len(x):
                torch._dynamo.mark_dynamic(each, 0)
        with torch.no_grad():
            out: Tensor = compiled(x, *args)
        return out

    return call, graphs


@contextmanager
def fresh_code() -> Iterator[None]:
    """Compile anew what is on disk already: our passes have to see its graphs."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def counted_launches(monkeypatch: pytest.MonkeyPatch, *, slices: bool = True) -> list[int]:
    """Return a list that receives the matrices of each launch of the row kernel.

    Args:
        monkeypatch: the test's.
        slices: False to check that no graph takes a slice of a tensor.
    """
    from star_attention.linear import triton_row

    launches: list[int] = []
    fuse = triton_row.fuse_linears

    def counted(graph: torch.fx.Graph) -> None:
        fuse(graph)
        op = torch.ops.star_attention.linears.default
        launches.extend(len(node.args[1]) for node in graph.nodes if node.target == op)
        taken = graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
        assert slices or not taken

    monkeypatch.setattr(triton_row, "fuse_linears", counted)
    return launches
