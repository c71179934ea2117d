"""Find what is added to the results of a single token's experts, and have their launches add it.

That is an expert which all tokens share, whose products are two launches of their own otherwise,
and the residual.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Graph, Node

from star_attention.linear import folding

_aten, _ops = torch.ops.aten, torch.ops.star_attention
_VIEWS = (_aten.reshape.default, _aten.view.default)


def mix(graph: Graph) -> None:
    """Add shared experts and residuals within the launches of a token's experts.

    Args:
        graph: of a layer for one token, after `folding.fold`.
    """
    for node in graph.find_nodes(op="call_function", target=_ops.experts.default):
        if not folding.is_single_row(node.args[0]):
            continue
        made = _take_shared(graph, node) or node
        _take_residual(graph, made)


def _take_shared(graph: Graph, node: Node) -> Node | None:
    """Compute a shared expert with the others, if there is one; return the new node."""
    seen = _viewed(node)
    second = _only_user(seen)
    if second is None or second.target != _ops.folded_linears.default or second.args[5] is not seen:
        return None
    first = cast(Any, second.args[0])
    if first.target != _ops.folded_linears.default or len(first.users) != 1:
        return None
    x, *_, activation = cast(Any, node.args[:6])
    weights = [*_whole(first), *_whole(second)]
    stored: list[Any] = [folding.value_of(weight) for weight in (*weights, node.args[1])]
    if (
        len(weights) != 3
        or first.args[5] is not None
        or first.args[6] != activation
        or _base(first.args[0]) is not _base(x)
        or len({value.dtype for value in stored if value is not None}) != 1
        or stored[0].stride() != stored[1].stride()
    ):
        return None
    return _become(graph, second, (*node.args[:6], weights, None), [second, first, seen, node])


def _take_residual(graph: Graph, node: Node) -> None:
    """Add the residual within the launches of experts, if they have none yet."""
    seen = _viewed(node)
    added = _only_user(seen)
    if added is None or added.target != _aten.add.Tensor or added.kwargs:
        return
    residual = next((arg for arg in added.args if arg is not seen), None)
    if isinstance(residual, Node) and folding.are_alike(residual, seen, added):
        _become(graph, added, (*node.args[:7], residual), [added, seen, node])


def _become(graph: Graph, last: Node, args: tuple[Any, ...], old: list[Node]) -> Node:
    """Replace nodes by experts with other arguments, at the place of the last one."""
    x = folding.value_of(args[0])
    assert x is not None
    with graph.inserting_before(last):
        made = graph.call_function(_ops.experts.default, args)
        made.meta["val"] = x.new_empty(x.shape)
        shape = list(last.meta["val"].shape)
        view = graph.call_function(_aten.reshape.default, (made, shape))
    view.meta = dict(last.meta)
    last.replace_all_uses_with(view)
    folding.erase(graph, old)
    return made


def _whole(node: Any) -> list[Node]:
    """Return the matrices of products, none if parts, biases or scales are multiplied."""
    _, weights, biases, parts, scales, *_ = node.args
    if any(each is not None for each in (*biases, *scales)):
        return []
    row: Any = folding.value_of(node.args[0])
    values = [folding.value_of(weight) for weight in weights]
    whole = [size for value in values if value is not None for size in (0, value.shape[0], 0)]
    same = whole == list(parts) and all(
        value is not None and value.shape[1] == row.shape[-1] for value in values
    )
    return list(weights) if same else []


def _viewed(node: Node) -> Node:
    """Return the last of the views of a node."""
    while (user := _only_user(node)) is not None and user.target in _VIEWS:
        node = user
    return node


def _base(node: Any) -> Any:
    """Return what a node is a view of."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
