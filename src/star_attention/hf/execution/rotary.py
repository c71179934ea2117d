"""Find rotary embeddings in a layer's graph, and leave them to our kernels, with the norms of heads
before them.

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
from star_attention.hf.execution import hook, sums  # noqa: F401
from star_attention.linear import folding, norm_folding

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
_LAYER = torch.ops.star_attention.layer.default
_ROTARY_LAYER = torch.ops.star_attention.rotary_layer.default
_MOVES = {
    _aten.alias.default,
    _aten.cat.default,
    _aten.clone.default,
    _aten.expand.default,
    _aten.reshape.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.squeeze.dim,
    _aten.unsqueeze.default,
    _aten.view.default,
}
"""Operations that only move numbers."""
_SWAPS = (_aten.permute.default, _aten.transpose.int)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_NODES = 32
"""Nodes of a rotary embedding, at most."""
_ROWS = 3
"""Instead of a number of rows that varies."""


class Found(NamedTuple):
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
        of_query, of_key = find(query), find(key)
        if of_query is None or of_key is None or of_query[1:] != of_key[1:]:
            continue
        if of_query.cos.meta["val"].dim() != 3:
            continue
        _, cos, sin, pairs = of_query
        with graph.inserting_before(node):
            x, weights, numbers = _with_norms(graph, of_query.x, of_key.x)
            args = *x, value, value_size, cos, sin, pairs, weights, numbers, *rule
            made = graph.call_function(_ROTARY_LAYER, args)
        # The rest of what torch knows of the operation is of other arguments.
        made.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        folding.erase(graph, [*walk(query, None)[0], *walk(key, None)[0]])
        graph.eliminate_dead_code()


def _with_norms(graph: Graph, query: Node, key: Node) -> tuple[list[Node], list[Node], list[float]]:
    """Return queries and keys before the norms of their heads, and `norms` and `norm_numbers`.

    Those are empty where there are no norms, or where all ranks' heads are gathered after them.
    """
    sides = [_normed(each) for each in (query, key)]
    norms = [norm for norm, _ in sides if norm is not None]
    if len(norms) < 2 or graph.find_nodes(op="call_function", target=sums.OPERATIONS[0]):
        return [query, key], [], []
    of_query, of_key = norms
    if (of_query.offset, of_query.eps) != (of_key.offset, of_key.eps):
        return [query, key], [], []
    return (
        [_moved_alike(graph, norm.x, move) for norm, (_, move) in zip(norms, sides, strict=True)],
        [norm.weight for norm in norms],
        [of_query.offset, of_query.eps],
    )


def _normed(x: Node) -> tuple[norm_folding.Norm | None, Node | None]:
    """Return the norm of heads that queries or keys are, and what moves its result, if they are."""
    norm = norm_folding.norm_of(x)
    if norm is not None or x.target not in _SWAPS or not isinstance(x.args[0], Node):
        return norm, None
    moved = x.args[0]
    value = folding.value_of(moved)
    # The heads' elements stay last.
    if value is None or x.args[1:] not in (([0, 2, 1, 3],), (1, 2)):
        return None, None
    return norm_folding.norm_of(moved), x


def _moved_alike(graph: Graph, x: Node, move: Node | None) -> Node:
    """Move what has not been normed as its norm is moved."""
    if move is None:
        return x
    made = graph.call_function(cast(Any, move.target), (x, *move.args[1:]))
    made.meta = dict(move.meta)
    return made


def find(node: Any) -> Found | None:
    """Return the rotary embedding that a node ends, if it does."""
    value = folding.value_of(node)
    if value is None or value.dim() != 4 or not isinstance(value.shape[3], int):
        return None
    everything = [each for part in walk(node, None) for each in part]
    # The latest candidate comes first: what is rotated may be the result of a norm.
    for x in sorted(everything, reverse=True):
        if x is node or not folding.are_alike(x, node):
            continue
        chain, leaves = walk(node, x)
        angles = [each for each in leaves if each is not x]
        if len(angles) != 2 or len(leaves) != 3 or not all(_are_angles(a, node) for a in angles):
            continue
        for (cos, sin), pairs in itertools.product(itertools.permutations(angles), (False, True)):
            found = Found(x, cos, sin, pairs)
            if _is_rotation(node, chain, found):
                return found
    return None


def walk(node: Node, stop: Node | None) -> tuple[list[Node], list[Node]]:
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
    if target == _aten.select.int and _is_view_as_real(node):
        # Of complex angles: cosines or sines.
        return False
    if target == operator.getitem:
        return cast(Node, node.args[0]).target == _aten.split.Tensor
    return target in _MOVES or torch.Tag.pointwise in getattr(target, "tags", ())


def _is_view_as_real(node: Node) -> bool:
    return cast(Node, node.args[0]).target == _aten.view_as_real.default


def _is_rotation(node: Node, chain: list[Node], found: Found) -> bool:
    """True if the nodes rotate random numbers as `Rotation` does."""
    random = torch.Generator("cpu").manual_seed(0)
    values: dict[Node, Any] = {
        leaf: torch.randn(_sizes(leaf), generator=random, dtype=torch.float64, device="cpu")
        for leaf in found[:3]
    }
    rotation = Rotation(cos_RQE=values[found.cos], sin_RQE=values[found.sin], pairs=found.pairs)
    rotation = rotation.without_heads()
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
    one_a_token = sizes[:-1] in ((R, Q), (1, Q), (R, 1, Q), (1, 1, Q))
    return one_a_token and sizes[-1] in (D, D // 2)
