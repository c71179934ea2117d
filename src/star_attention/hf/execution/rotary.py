"""Find rotary embeddings in a layer's graph, and leave them to our kernels.

They are recognized by what they compute, not by how a model or torch writes them: candidates are
run on random numbers and compared. What is not recognized stays as it is.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, NamedTuple, cast

import torch
from torch import SymInt
from torch.fx import Graph, Node

from star_attention.attention.rotation import Rotation

# Imported for its operations.
from star_attention.hf.execution import hook  # noqa: F401
from star_attention.linear import folding

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
_LAYER = torch.ops.star_attention.layer.default
_ROTARY_LAYER = torch.ops.star_attention.rotary_layer.default
_MOVES = {
    _aten.alias.default,
    _aten.cat.default,
    _aten.clone.default,
    _aten.expand.default,
    _aten.reshape.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.squeeze.dim,
    _aten.unsqueeze.default,
    _aten.view.default,
}
"""Operations that only move numbers."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_NODES = 32
"""Nodes of a rotary embedding, at most."""
_ROWS = 3
"""Instead of a number of rows that varies."""


class _Found(NamedTuple):
    """A rotary embedding: what is rotated, cosines, sines, and `Rotation.pairs`."""

    x: Node
    cos: Node
    sin: Node
    pairs: bool


def leave_to_kernels(graph: Graph) -> None:
    """Have our operation of attention rotate its queries and keys.

    Args:
        graph: of a layer for one new token of each row.
    """
    for node in graph.find_nodes(op="call_function", target=_LAYER):
        query, key, value, value_size, *rule = cast(Any, node.args)
        if not all(len(each.users) == 1 for each in (query, key)):
            continue
        of_query, of_key = _find(query), _find(key)
        if of_query is None or of_key is None or of_query[1:] != of_key[1:]:
            continue
        _, cos, sin, pairs = of_query
        with graph.inserting_before(node):
            args = of_query.x, of_key.x, value, value_size, cos, sin, pairs, *rule
            made = graph.call_function(_ROTARY_LAYER, args)
        # The rest of what torch knows of the operation is of other arguments.
        made.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        folding.erase(graph, [*_walk(query, None)[0], *_walk(key, None)[0]])


def _find(node: Any) -> _Found | None:
    """Return the rotary embedding that a node ends, if it does."""
    value = folding.value_of(node)
    if value is None or value.dim() != 4 or not isinstance(value.shape[3], int):
        return None
    everything = [each for part in _walk(node, None) for each in part]
    # The latest candidate comes first: what is rotated may be the result of a norm.
    for x in sorted(everything, reverse=True):
        if x is node or not folding.are_alike(x, node):
            continue
        chain, leaves = _walk(node, x)
        angles = [each for each in leaves if each is not x]
        if len(angles) != 2 or len(leaves) != 3 or not all(_are_angles(a, node) for a in angles):
            continue
        for (cos, sin), pairs in itertools.product(itertools.permutations(angles), (False, True)):
            found = _Found(x, cos, sin, pairs)
            if _is_rotation(node, chain, found):
                return found
    return None


def _walk(node: Node, stop: Node | None) -> tuple[list[Node], list[Node]]:
    """Return what `folding.walk` does, but for sizes.

    Args:
        stop: a node with which they begin in any case.
    """

    def inside(each: Node) -> bool:
        return each is not stop and not _is_size(each) and _is_inside(each)

    chain, leaves = folding.walk(node, inside, most=_MOST_NODES)
    return chain, [each for each in leaves if not _is_size(each)]


def _is_inside(node: Node) -> bool:
    """True for operations that a rotary embedding may consist of."""
    target: Any = node.target
    if target == _convert:
        # Others are more than a rounding, which our kernels do without.
        return node.args[1] in _FLOATS
    if target == operator.getitem:
        return cast(Node, node.args[0]).target == _aten.split.Tensor
    return target in _MOVES or torch.Tag.pointwise in getattr(target, "tags", ())


def _is_rotation(node: Node, chain: list[Node], found: _Found) -> bool:
    """True if the nodes rotate random numbers as `Rotation` does."""
    random = torch.Generator("cpu").manual_seed(0)
    values: dict[Node, Any] = {
        leaf: torch.randn(_sizes(leaf), generator=random, dtype=torch.float64, device="cpu")
        for leaf in found[:3]
    }
    rotation = Rotation(cos_RQE=values[found.cos], sin_RQE=values[found.sin], pairs=found.pairs)
    expected = rotation.rotate(values[found.x].transpose(1, 2)).transpose(1, 2)

    def value_of(each: Node) -> Any:
        return _size(each.meta["val"]) if _is_size(each) else values[each]

    try:
        for each in chain:
            target: Any = each.target
            args, kwargs = torch.fx.map_arg((each.args, each.kwargs), value_of)
            values[each] = args[0] if target == _convert else target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, KeyError):
        return False
    out = values[node]
    return out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-9, atol=1e-9)


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, SymInt))


def _size(value: Any) -> int:
    """Return a size of a graph as a number."""
    if isinstance(value, int):
        return value
    if value.node.expr.is_symbol:
        return _ROWS
    raise ValueError(f"expected a number of rows, got {value}")


def _sizes(node: Node) -> tuple[int, ...]:
    value = folding.value_of(node)
    assert value is not None
    return tuple(size if isinstance(size, int) else _ROWS for size in value.shape)


def _are_angles(node: Node, rotated: Node) -> bool:
    """True for a number, or one for each two, of each element of a head, for each token."""
    if folding.value_of(node) is None:
        return False
    R, _, Q, D = _sizes(rotated)
    sizes = _sizes(node)
    return sizes[:-1] in ((R, Q), (1, Q)) and sizes[-1] in (D, D // 2)
