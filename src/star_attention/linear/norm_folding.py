"""Find the norms of rows in a layer's graph, and the sums around them, for our kernels.

Norms are recognized by what they compute, as `folding` recognizes activations. A norm becomes a
launch of its own together with what is before it: a sum with the residual, of a product or of all
ranks' products, and the norm of that product (Gemma). What is not recognized stays as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

# Operations are imported with `triton_few_folded`.
from star_attention.linear import folding, triton_few_folded, triton_norm  # noqa: F401

_aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default
_ROW_NORMS = torch.ops.star_attention.row_norms.default
_FOLDED = torch.ops.star_attention.folded_linears.default
_NORMED = torch.ops.star_attention.normed_linear.default
_OURS = "star_attention"
_VIEWS = (_aten.reshape.default, _aten.view.default)
_LINEARS = torch.ops.star_attention.linears.default
_Sums = tuple[Any, Any, Any] | None
# Of a norm. An addition of two tensors is not part of one.
_NORM_OPS = {
    _convert,
    _aten.add.Tensor,
    _aten.add.Scalar,
    _aten.mean.dim,
    _aten.mul.Tensor,
    _aten.pow.Tensor_Scalar,
    _aten.rsqrt.default,
}


@dataclass(frozen=True)
class Norm:
    """An RMS norm of a graph."""

    x: Node
    weight: Node
    offset: float
    eps: float


@dataclass(frozen=True)
class _Added:
    """What a residual is added to: `times` the norm, if there is one, of `x`."""

    x: Node
    residual: Node
    norm: Norm | None
    times: float


def fold(graph: Graph, sums: _Sums = None) -> None:
    """Compute norms of rows, and the sums before them, by kernels of their own.

    Args:
        graph: of a layer for one token, or one of each row, after `folding.fold` and
            `shared_experts.mix`.
        sums: the operation that sums a row over ranks, that with what follows, and that with the
            product before it, too.
    """
    norms = _find(graph)
    for node in list(graph.nodes):
        if node in norms and _feeds_ours(node):
            _fold_norm(graph, node, norms, sums)
    for node in graph.find_nodes(op="call_function", target=_aten.add.Tensor):
        added = _added_of(node, norms, sums)
        if added is None:
            continue
        if added.norm is not None or _is_sum(added.x, added.residual, sums):
            _become(graph, added.x, added, None, [node], sums)
    graph.eliminate_dead_code()


def join_products(graph: Graph) -> None:
    """Compute norms of a few rows together with the product before them, whose splits are summed.

    Args:
        graph: of a layer for one token of each row, after `fold`.
    """
    for node in graph.find_nodes(op="call_function", target=_ROW_NORMS):
        x, post, _, residual, *_ = cast(Any, node.args)
        if x.target == _FOLDED and x.args[5] is not None and post is None and residual is None:
            _join_folded(graph, x, node)
        elif x.target == operator.getitem and len(x.users) == 1 and x.args[0].target == _LINEARS:
            _join_linear(graph, x, node)


def _join_folded(graph: Graph, product: Node, norms: Node) -> None:
    """Join the norm of a sum with a residual; others need the sum, too."""
    x, weights, biases, parts, scales, residual, _ = cast(Any, product.args)
    rest = None, 1.0, residual, *norms.args[4:]
    with graph.inserting_before(product):
        made = graph.call_function(_NORMED, (x, weights[0], biases[0], parts, scales[0], *rest))
        added = graph.call_function(operator.getitem, (made, 0))
    made.meta["val"] = [product.meta["val"], *norms.meta["val"]]
    added.meta = dict(product.meta)
    product.replace_all_uses_with(added)
    for taken in list(norms.users):
        taken.args = made, 1
    folding.erase(graph, [product, norms])


def _join_linear(graph: Graph, x: Node, norms: Node) -> None:
    """Join what follows a product that nothing else needs."""
    rows, weights, biases, parts, scales = cast(Any, cast(Node, x.args[0]).args)
    if len(weights) != 1:
        return
    with graph.inserting_before(norms):
        made = graph.call_function(
            _NORMED, (rows, weights[0], biases[0], parts, scales[0], *norms.args[1:])
        )
    made.meta = dict(norms.meta)
    norms.replace_all_uses_with(made)
    folding.erase(graph, [norms, x, cast(Node, x.args[0])])


def _find(graph: Graph) -> dict[Node, Norm]:
    """Return the norms of rows, by the node of their result."""
    found: dict[Node, Norm] = {}
    for node in graph.nodes:
        if node.target in (_aten.mul.Tensor, _convert) and folding.are_rows(node):
            norm = norm_of(node)
            if norm is not None and triton_norm.serves(cast(Tensor, folding.value_of(norm.x))):
                found[node] = norm
    return found


def norm_of(node: Node) -> Norm | None:
    """Return the RMS norm of rows that a node is, if it is one."""
    chain, leaves = folding.walk(node, _is_of_norm)
    if not any(each.target == _aten.rsqrt.default for each in chain) or len(leaves) != 2:
        return None
    rows = [leaf for leaf in leaves if folding.are_alike(leaf, node)]
    weights = [leaf for leaf in leaves if leaf.op == "placeholder" and leaf not in rows]
    if len(rows) != 1 or len(weights) != 1:
        return None
    (x,), (weight,) = rows, weights
    row, values = cast(Tensor, folding.value_of(x)), folding.value_of(weight)
    if values is None or values.shape != row.shape[-1:] or values.dtype != row.dtype:
        return None
    for eps in {arg for each in chain for arg in each.args if isinstance(arg, float)}:
        for offset in (0.0, 1.0):
            if _computes(node, chain, Norm(x, weight, offset, eps), row.dim()):
                return Norm(x, weight, offset, eps)
    return None


def _is_of_norm(node: Node) -> bool:
    if node.target not in _NORM_OPS or node.kwargs:
        return False
    if node.target == _convert:
        return node.args[1] in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    adds = node.target in (_aten.add.Tensor, _aten.add.Scalar)
    return not adds or len(node.all_input_nodes) == 1


def _computes(node: Node, chain: list[Node], norm: Norm, axes: int) -> bool:
    """Compare nodes with a norm on a row that is large beside epsilon, and on a small one."""
    numbers = torch.linspace(-2, 3, 16, dtype=torch.float64, device="cpu")
    weight = torch.linspace(0.5, 1.5, 16, dtype=torch.float64, device="cpu")
    for size in (1.0, norm.eps**0.5):
        row = (numbers * size).view(*[1] * (axes - 1), 16)
        right = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + norm.eps)
        try:
            out = folding.computed(node, chain, {norm.x: row, norm.weight: weight})
        except (RuntimeError, TypeError):
            return False
        if not folding.equal(out, right * (weight + norm.offset)):
            return False
    return True


def _feeds_ours(node: Node) -> bool:
    """True if an operation of ours takes a node's result, so that it must be in memory."""
    return any(
        _is_ours(user) or (user.target in _VIEWS and _feeds_ours(user)) for user in node.users
    )


def _is_ours(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == _OURS


def _is_ready(node: Node) -> bool:
    """True if a node's result is in memory without a launch for it."""
    while node.target in (operator.getitem, *_VIEWS):
        node = cast(Node, node.args[0])
    return node.op == "placeholder" or _is_ours(node)


def _is_sum(node: Node, residual: Node | None, sums: _Sums) -> bool:
    """True if a node is a sum over ranks that can be computed with what follows."""
    if sums is None or node.target != sums[0] or len(node.users) != 1:
        return False
    return residual is None or residual < node


def _added_of(node: Node, norms: dict[Node, Norm], sums: _Sums) -> _Added | None:
    """Return what a node adds to a residual, if it is such a sum."""
    if node.target != _aten.add.Tensor or node.kwargs or not folding.are_rows(node):
        return None
    if len(node.args) != 2 or not all(isinstance(each, Node) for each in node.args):
        return None
    a, b = cast(tuple[Node, Node], node.args)
    if not (folding.are_alike(a, node) and folding.are_alike(b, node)):
        return None
    value = cast(Tensor, folding.value_of(node))
    found = [
        added
        for inner, residual in ((a, b), (b, a))
        if _is_ready(residual) and triton_norm.serves(value)
        if (added := _inner(inner, residual, norms)) is not None
    ]
    # The row to begin with is that which only this launch needs.
    return max(
        found,
        key=lambda each: (each.norm is not None, _is_sum(each.x, each.residual, sums)),
        default=None,
    )


def _inner(inner: Node, residual: Node, norms: dict[Node, Norm]) -> _Added | None:
    times = 1.0
    if inner.target == _aten.mul.Tensor and len(inner.users) == 1:
        factors = [arg for arg in inner.args if isinstance(arg, (int, float))]
        nodes = inner.all_input_nodes
        if len(factors) == 1 and len(nodes) == 1 and folding.are_alike(nodes[0], inner):
            times, inner = float(factors[0]), nodes[0]
    norm = norms.get(inner)
    if norm is not None and len(inner.users) == 1 and _is_ready(norm.x):
        return _Added(norm.x, residual, norm, times)
    return _Added(inner, residual, None, times) if _is_ready(inner) else None


def _call_sum(graph: Graph, node: Node, args: tuple[Any, ...], sums: tuple[Any, Any, Any]) -> Node:
    """Call the sum that a node is with what follows, and with the product before it if it can."""
    taken, *rest = node.args
    assert isinstance(taken, Node)
    product = taken.args[0] if taken.target == operator.getitem else None
    if isinstance(product, Node) and product.target == _LINEARS and len(taken.users) == 1:
        x, weights, biases, parts, scales = cast(Any, product.args)
        if len(weights) == 1:
            args = (x, weights[0], biases[0], parts, scales[0], *rest, *args)
            return graph.call_function(sums[2], args)
    return graph.call_function(sums[1], (taken, *rest, *args))


def _fold_norm(graph: Graph, node: Node, norms: dict[Node, Norm], sums: _Sums) -> None:
    """Compute a norm together with what is before it, if a launch for that is not needed."""
    norm = norms[node]
    added = _added_of(norm.x, norms, sums)
    if added is not None:
        _become(graph, added.x, added, norm, [norm.x, node], sums)
    elif _is_ready(norm.x):
        _become(graph, norm.x, None, norm, [node], sums)


def _become(
    graph: Graph,
    x: Node,
    added: _Added | None,
    norm: Norm | None,
    results: list[Node],
    sums: _Sums,
) -> None:
    """Compute nodes by one operation."""
    post = None if added is None else added.norm
    pair = [each or Norm(x, x, 0.0, 0.0) for each in (post, norm)]
    args = (
        None if post is None else post.weight,
        1.0 if added is None else added.times,
        None if added is None else added.residual,
        None if norm is None else norm.weight,
        [each.offset for each in pair],
        [each.eps for each in pair],
    )
    if _is_sum(x, None if added is None else added.residual, sums):
        assert sums is not None
        # Where it was: ranks meet in one order, whether they compile their layers or not.
        with graph.inserting_after(x):
            made = _call_sum(graph, x, args, sums)
    else:
        with graph.inserting_before(results[0]):
            made = graph.call_function(_ROW_NORMS, (x, *args))
    made.meta["val"] = [each.meta["val"] for each in results]
    for index, each in reversed(list(enumerate(results))):
        with graph.inserting_after(made):
            taken = graph.call_function(operator.getitem, (made, index))
        taken.meta = dict(each.meta)
        each.replace_all_uses_with(taken)
