"""Find the work around products of rows in a layer's graph, and have our kernels do it.

Two kinds: an activation that gates one of two products, and the sum with a residual. Activations
are recognized by what they compute, not by how a model or torch writes them: candidates are run on
numbers near and far. What is not recognized stays as it is. The norm before products is a launch
of its own (`norm_folding`): folded into them, each program would read the norm's weight and sum the
squares of the whole row, which takes longer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

# Imported for its operation.
from star_attention.linear import triton_folded  # noqa: F401
from star_attention.linear.triton_experts import ACTIVATIONS

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
_LINEARS = torch.ops.star_attention.linears.default
_FOLDED = torch.ops.star_attention.folded_linears.default
_MOST_NODES = 24
"""Nodes of an activation, at most."""
_FAR = (1e2, 1e4, 1e30)
"""Where limits of an activation show, such as a clamp, if they lie beyond its curve."""


def fold(graph: Graph) -> None:
    """Fold what surrounds the products of rows into their launches.

    Args:
        graph: of a layer for one token, or one of each row, after `triton_row.fuse_linears`.
    """
    for node in graph.find_nodes(op="call_function", target=_LINEARS):
        x, weights, *_ = cast(Any, node.args)
        if not are_rows(x):
            continue
        if len(weights) == 1:
            _fold_residual(graph, node)
        elif len(weights) == 2:
            _fold_gate(graph, node)


def is_single_row(x: Any) -> bool:
    value = value_of(x)
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return False
    return value.dim() > 1 and value.numel() == value.shape[-1]


def are_rows(x: Any) -> bool:
    """True for a single row, or for one of each of a number that varies: `[..., K]`."""
    value = value_of(x)
    if value is None or value.dim() < 2 or not isinstance(value.shape[-1], int):
        return False
    numbers = [size for size in value.shape[:-1] if not isinstance(size, int) or size != 1]
    return len(numbers) <= 1 and not any(isinstance(number, int) for number in numbers)


def value_of(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _fold_gate(graph: Graph, node: Node) -> None:
    """Fold the activation of one of two products, and the product with the other."""
    taken = {
        cast(int, user.args[1]): user for user in node.users if user.target == operator.getitem
    }
    if set(taken) != {0, 1} or len(node.users) != 2 or not _have_one_shape(node):
        return
    for at_gate, gate in taken.items():
        up = taken[1 - at_gate]
        gated = next(iter(up.users), None)
        if len(up.users) != 1 or gated is None or gated.target != _aten.mul.Tensor:
            continue
        other = next((arg for arg in gated.args if arg is not up), None)
        activation = _activation_of(other, gate, gated)
        if activation is not None and are_alike(gated, up):
            name, chain = activation
            _become_gated(graph, node, gated, gate is taken[1], name)
            erase(graph, [*chain, gate, up, node])
            return


def _have_one_shape(node: Node) -> bool:
    """True for two matrices of the same rows, and with weights of one kind."""
    _, given, _, parts, scales = cast(Any, node.args)
    weights: list[Any] = [value_of(weight) for weight in given]
    return (
        None not in weights
        and parts[1] == parts[4]
        and (scales[0] is None) == (scales[1] is None)
        and weights[0].dtype == weights[1].dtype
        and weights[0].stride() == weights[1].stride()
    )


def _activation_of(node: Any, gate: Node, gated: Node) -> tuple[str, list[Node]] | None:
    """Return the activation that a node is of the gate, and its nodes, if it is one."""
    if not isinstance(node, Node) or node is gate:
        return None
    chain, leaves = walk(node, is_pointwise)
    inside = {*chain, gated}
    alone = all(user in inside for each in (*chain, gate) for user in each.users)
    if leaves != [gate] or not alone:
        return None
    values = _probe()
    try:
        out = computed(node, chain, {gate: values})
    except (RuntimeError, TypeError):
        return None
    for name, activation in ACTIVATIONS.items():
        if equal(out, activation(values)):
            return name, chain
    return None


def _probe() -> Tensor:
    """Return the numbers that activations are compared at, in fp64."""
    # Not on torch's default device, where there may be nothing to read.
    near = torch.linspace(-12, 12, 193, dtype=torch.float64, device="cpu").tolist()
    far = [sign * value for value in _FAR for sign in (1, -1)]
    return torch.tensor([*near, *far], dtype=torch.float64, device="cpu")


def is_pointwise(node: Node) -> bool:
    target: Any = node.target
    if target == _convert:
        # Others than these are more than a rounding, which folded launches do without.
        return node.args[1] in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return node.op == "call_function" and torch.Tag.pointwise in getattr(target, "tags", ())


def _become_gated(graph: Graph, node: Node, gated: Node, swapped: bool, name: str) -> None:
    """Compute a gated product by a node of its own, at the place of the products."""
    order = slice(None, None, -1) if swapped else slice(None)
    x, weights, biases, parts, scales = cast(Any, node.args)
    parts = parts[3:] + parts[:3] if swapped else parts
    weights, biases, scales = (list(each)[order] for each in (weights, biases, scales))
    with graph.inserting_before(node):
        _become(graph, gated, (x, weights, biases, parts, scales, None, name))


def _fold_residual(graph: Graph, node: Node) -> None:
    """Fold the sum of a single product and a residual."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or user.target != operator.getitem:
        return
    if len(user.users) != 1:
        return
    added = next(iter(user.users))
    if added.target != _aten.add.Tensor or added.kwargs:
        return
    residual = next((arg for arg in added.args if arg is not user), None)
    if not isinstance(residual, Node) or not are_alike(residual, user, added):
        return
    with graph.inserting_before(added):
        _become(graph, added, (*node.args, residual, ""))
    erase(graph, [user, node])


def _become(graph: Graph, node: Node, args: tuple[Any, ...]) -> None:
    """Make a node a folded one."""
    made = graph.call_function(_FOLDED, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def are_alike(*nodes: Node) -> bool:
    """True for tensors of one shape and precision; nodes without a value have another each."""
    first, *others = (value_of(node) for node in nodes)
    # Sizes that vary cannot be hashed.
    return first is not None and all(
        other is not None and other.shape == first.shape and other.dtype == first.dtype
        for other in others
    )


def walk(
    node: Node, inside: Callable[[Node], bool], *, most: int = _MOST_NODES
) -> tuple[list[Node], list[Node]]:
    """Return the nodes that a node is computed by, and those that they begin with; each sorted.

    No nodes where they are more than `most`.
    """
    found: set[Node] = set()
    leaves: set[Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in found or each in leaves:
            continue
        if not inside(each):
            leaves.add(each)
            continue
        found.add(each)
        if len(found) > most:
            return [], []
        waiting += each.all_input_nodes
    return sorted(found), sorted(leaves)


def computed(node: Node, chain: list[Node], values: dict[Node, Tensor]) -> Tensor:
    """Run nodes on values in fp64, without converting them."""
    values = dict(values)
    for each in chain:
        target: Any = each.target
        args: Any = [values[arg] if isinstance(arg, Node) else arg for arg in each.args]
        values[each] = args[0] if target == _convert else target(*args, **each.kwargs)
    return values[node]


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def erase(graph: Graph, nodes: list[Node]) -> None:
    """Erase those nodes that have no users."""
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            graph.erase_node(node)
