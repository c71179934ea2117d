"""Find a single token's choice of experts in a layer's graph, and have our kernels do it.

The scores are a product with a small matrix, which is no linear layer of the model's. What models
compute of the scores is recognized by what it gives, as activations are (`folding`); other ways
stay as they are, between our product and our choice.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

# Imported for its operations.
from star_attention.linear import folding, triton_router

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
_WHOLE_ROW = (_aten.amax.default, _aten.sum.dim_IntList)
"""Operations of a softmax that are not pointwise."""


def route(graph: Graph) -> None:
    """Have our kernels compute scores, and choose the largest of a single row.

    Args:
        graph: of a layer for one token.
    """
    for node in graph.find_nodes(op="call_function", target=_aten.mm.default):
        _score(graph, node)
    for node in graph.find_nodes(op="call_function", target=_aten.topk.default):
        _choose(graph, node)


def _score(graph: Graph, node: Node) -> None:
    """Replace a product of a single row and a weight."""
    x, turned = cast(Any, node.args)
    if turned.target != _aten.permute.default or not folding.is_single_row(x):
        return
    x, weight = _before_widening(x), _before_widening(turned.args[0])
    value = folding.value_of(weight)
    if weight.op != "placeholder" or value is None or value.dim() != 2 or value.stride(1) != 1:
        return
    with graph.inserting_before(node):
        made = graph.call_function(
            torch.ops.star_attention.scores.default, (x, weight, node.meta["val"].dtype)
        )
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    folding.erase(graph, [turned, node])


def _before_widening(node: Node) -> Node:
    """Return what a node converts to fp32, which changes no number, or the node itself."""
    if node.target != _convert or node.args[1] != torch.float32:
        return node
    before = cast(Node, node.args[0])
    value = folding.value_of(before)
    narrow = value is not None and value.dtype in (torch.float16, torch.bfloat16)
    return before if narrow else node


def _choose(graph: Graph, node: Node) -> None:
    """Replace the search for the largest of a single row."""
    x, k, *rest = cast(Any, node.args)
    dim, is_largest = rest[0] if rest else -1, len(rest) < 2 or rest[1]
    value = folding.value_of(x)
    if value is None or not folding.is_single_row(x) or node.kwargs or not is_largest:
        return
    if dim not in (-1, value.dim() - 1) or value.shape[-1] > triton_router.MOST_SCORES:
        return
    if not value.is_floating_point() or value.dtype == torch.float64:
        return
    kind, of = _kind(x, value)
    with graph.inserting_before(node):
        made = graph.call_function(
            torch.ops.star_attention.largest.default, (of, k, kind, value.dtype)
        )
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    if of is not x:
        folding.erase(graph, folding.walk(x, _may_be_softmax)[0])
    for chosen in list(made.users):
        if chosen.target == operator.getitem and chosen.args[1] == 0:
            _drop_factor(graph, chosen)


def _kind(x: Node, value: Tensor) -> tuple[str, Node]:
    """Return one of `triton_router.KINDS`, and of what it makes a row."""
    chain, leaves = folding.walk(x, _may_be_softmax)
    if len(leaves) != 1 or not chain:
        return "", x
    (leaf,) = leaves
    row = folding.value_of(leaf)
    if row is None or not folding.is_single_row(leaf) or row.shape != value.shape:
        return "", x
    probe = torch.linspace(-3, 4, value.numel(), dtype=torch.float64, device="cpu")
    probe = probe.sin().reshape(value.shape) * 5
    try:
        out = folding.computed(x, chain, {leaf: probe})
    except (RuntimeError, TypeError):
        return "", x
    for kind, function in triton_router.KINDS.items():
        if folding.equal(out, function(probe)):
            return kind, leaf
    return "", x


def _may_be_softmax(node: Node) -> bool:
    return folding.is_pointwise(node) or node.target in _WHOLE_ROW


def _drop_factor(graph: Graph, node: Node) -> None:
    """Leave out products with 1, which are a launch each."""
    for user in list(node.users):
        if user.target == _aten.mul.Tensor and user.args == (node, 1.0):
            user.replace_all_uses_with(node)
            graph.erase_node(user)
