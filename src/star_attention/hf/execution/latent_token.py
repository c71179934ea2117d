"""Find what MLA computes of a single token before its attention, and leave it to our kernel.

That is the norm of what it compresses, and the rotary embeddings of the key that all heads share
and of a part of each head's query. They are recognized by what they compute (`norm_folding`,
`rotary`). What is not recognized stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from star_attention.attention.rotation import Rotation
from star_attention.hf.execution import hook, rotary
from star_attention.linear import folding, norm_folding

_aten = torch.ops.aten
_layer = torch.ops.star_attention.layer
_VIEWS = (_aten.reshape.default, _aten.view.default)


@torch.library.custom_op("star_attention::latent_layer", mutates_args=())
def _latent_layer_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_size: int,
    norm: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pairs: bool,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Do as `hook`'s operation of a layer does with what is still to be computed.

    Args:
        query: `[1, H, 1, D]`, whose last elements, as many as `value` has, are to be rotated.
        key: what is compressed, `[1, 1, 1, C]`.
        value: rotary part of the key, `[1, 1, 1, P]`, to be rotated.
        value_size: elements of a head's result.
        norm: weight of the RMS norm of `key`, `[C]`; None if it has it.
        eps: what the norm adds to the mean square.
        cos: cosines of the angles, as `Rotation` has them, or with an axis of a single head; None
            if query and key are rotated.
        sin: sines.
        pairs: as `Rotation` has it.
        scaling: as attention takes it, as are the others.
        sliding_window: Likewise.
        softcap: Likewise.
        s_aux: Likewise.
    """
    rotation = None
    if cos is not None and sin is not None:
        rotation = Rotation(cos_RQE=cos, sin_RQE=sin, pairs=pairs).without_heads()
    cache = hook.cache_of_forward()
    if cache is None or not cache.finishes_latents:
        key = key if norm is None else _normed(key, norm, eps)
        if rotation is not None:
            size = value.shape[3]
            parts = query[..., :-size], _rotated(query[..., -size:], rotation)
            query, value = torch.cat(parts, -1), _rotated(value, rotation)
        rule = scaling, sliding_window, softcap, s_aux
        out: Tensor = _layer(query, key, value, value_size, *rule)
        return out
    layer = cache.layers[cache.entered]
    layer.expect_latent(key, value, None if norm is None else (norm, eps))
    options: dict[str, Any] = dict(
        scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
    )
    return hook.attention_of(cache, None, query, key, value, None, rotation=rotation, **options)[0]


@_latent_layer_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, value_size: int, *_: Any) -> Tensor:
    B, H, Q, _D = query.shape
    return query.new_empty(B, Q, H, value_size)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.element_size() == 8 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def _rotated(x_BHQD: Tensor, rotation: Rotation) -> Tensor:
    return rotation.rotate(x_BHQD.transpose(1, 2)).transpose(1, 2)


def leave_to_kernels(graph: Graph) -> None:
    """Have our operation of attention finish a single token's compressed key and its query.

    Args:
        graph: of a layer for one new token, after `multiply_reals`.
    """
    for node in graph.find_nodes(op="call_function", target=_layer.default):
        query, key, value, value_size, *rule = cast(Any, node.args)
        if not _is_compressed(query, key, value):
            continue
        found, norm = _rotation(query, value), _norm(key)
        if found is None and norm is None:
            continue
        source, rotary_key, *angles = found or (query, value, None, None, False)
        with graph.inserting_before(node):
            if norm is not None:
                shape = list(key.meta["val"].shape)
                key_before = graph.call_function(_aten.reshape.default, (norm.x, shape))
                key_before.meta["val"] = key.meta["val"].new_empty(shape)
            else:
                key_before = key
            of_norm = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            args = source, key_before, rotary_key, value_size, *of_norm, *angles, *rule
            made = graph.call_function(torch.ops.star_attention.latent_layer.default, args)
        made.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        graph.eliminate_dead_code()


def _is_compressed(query: Node, key: Node, value: Node) -> bool:
    """True for a single token whose keys are no expanded ones, and that only attention reads."""
    nodes = query, key, value
    shapes: list[Any] = [getattr(folding.value_of(each), "shape", ()) for each in nodes]
    if any(len(shape) != 4 or shape[0] != 1 or shape[2] != 1 for shape in shapes):
        return False
    of_query, of_key, of_value = shapes
    is_shared = of_key[1] == of_value[1] == 1 and of_query[3] != of_key[3]
    return is_shared and all(len(each.users) == 1 for each in nodes)


def _rotation(query: Node, value: Node) -> tuple[Node, Node, Node, Node, bool] | None:
    """Return query and rotary key before their rotation, cosines, sines, and if pairs turn."""
    if query.target != _aten.cat.default:
        return None
    given: Any = query.args
    parts, axis = given[0], given[-1]
    if len(parts) != 2 or axis not in (-1, 3):
        return None
    of_query, of_key = rotary.find(parts[1]), rotary.find(value)
    if of_query is None or of_key is None or of_query[1:] != of_key[1:]:
        return None
    plain, turned = parts[0], of_query.x
    if any(each.target != operator.getitem for each in (plain, turned)):
        return None
    split: Any = plain.args[0]
    is_whole = (
        (plain.args[1], turned.args) == (0, (split, 1))
        and split.target == _aten.split_with_sizes.default
        and folding.are_alike(split.args[0], query)
    )
    return (split.args[0], of_key.x, *of_query[1:]) if is_whole else None


def _norm(key: Node) -> norm_folding.Norm | None:
    """Return the norm that a compressed key ends, if it does."""
    while key.target in _VIEWS and len(key.users) == 1:
        key = cast(Node, key.args[0])
    norm = norm_folding.norm_of(key) if len(key.users) == 1 else None
    return norm if norm is not None and norm.offset == 0.0 else None
