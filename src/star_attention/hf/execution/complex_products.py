"""Products of complex numbers in compiled layers, written out in reals.

DeepSeek's rotary embeddings are such products. Inductor leaves them to torch's own operations, a
launch each, and on a GPU it fails where the numbers are not contiguous, as queries of a head's
rotary part are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def multiply_reals(graph: fx.Graph) -> None:
    """Replace each product of complex numbers that is viewed as reals by products of reals."""
    # Of each factor its real and its imaginary parts: queries and keys have the angles in common.
    known: dict[Any, list[Any]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.view_as_real.default):
        product = node.args[0]
        if product.target is aten.mul.Tensor and all(
            isinstance(factor, fx.Node) and factor.meta["val"].is_complex()
            for factor in product.args
        ):
            _write_out(graph, node, product, known)


def _write_out(graph: fx.Graph, node: Any, product: Any, known: dict[Any, list[Any]]) -> None:
    """Replace `node`, the view as reals of a product."""

    def call(target: Any, *args: Any) -> Any:
        with graph.inserting_before(node):
            made = graph.call_function(target, args)
        made.meta["val"] = target(*fx.map_arg(args, lambda each: each.meta["val"]))
        return made

    def parts(factor: Any) -> list[Any]:
        if factor not in known:
            is_view = factor.target is aten.view_as_complex.default
            pairs = factor.args[0] if is_view else call(aten.view_as_real.default, factor)
            known[factor] = [call(aten.select.int, pairs, -1, at) for at in (0, 1)]
        return known[factor]

    (a, b), (c, d) = map(parts, product.args)
    mul = aten.mul.Tensor
    real = call(aten.sub.Tensor, call(mul, a, c), call(mul, b, d))
    imaginary = call(aten.add.Tensor, call(mul, a, d), call(mul, b, c))
    halves = [call(aten.unsqueeze.default, part, -1) for part in (real, imaginary)]
    node.replace_all_uses_with(call(aten.cat.default, halves, -1))
    for old in (node, product, *product.args):
        if old.op == "call_function" and not old.users:
            graph.erase_node(old)
