"""Layers that can be multiplied in slices: groups whose slices fit together.

In a group the outputs of some layers are the inputs of the last: query, key and value before the
output projection, gate and up before down. A rank that computes its slice of the outputs has the
inputs of its slice of the last layer, whose results are summed over the ranks. The model's
tensor-parallel plan names the layers; shapes are checked here, since everything else stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any

from torch import Tensor, nn

from star_attention.hf.cache.probe import LayerKVShape
from star_attention.hf.loading import tensor_parallel
from star_attention.hf.loading.plain_experts import are_plain_experts
from star_attention.linear.fp8 import Fp8Linear
from star_attention.planning.traffic import ALIGNMENT, padded_share

ATTENTION, MLP, EXPERTS, HEAD = "attention", "mlp", "experts", "head"
PARTS = (ATTENTION, MLP, EXPERTS, HEAD)
"""Parts of a model that are sliced, each as a whole: attention by heads, MLPs and experts by hidden
rows, the language-model head by rows of the vocabulary."""

_MODULES, _PARAMETERS = itemgetter("_modules"), itemgetter("_parameters")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
_KIND = attrgetter("shape", "dtype", "device")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers whose slices fit together.

    Attributes:
        part: the part of the model, of `PARTS`.
        layers: the layers: of several, a rank multiplies a slice of the last one's inputs, and
            computes a slice of the others' outputs.
        owners: for each layer the module that holds it, and its name there.
    """

    part: str
    layers: list[Any]
    owners: list[tuple[nn.Module, str]]

    @classmethod
    def of(cls, part: str, owner: nn.Module, *names: str) -> Group:
        """Return the group of some children of a module."""
        layers = [getattr(owner, name) for name in names]
        return cls(part=part, layers=layers, owners=[(owner, name) for name in names])

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the group."""
        return sum(weight.nbytes for layer in self.layers for weight in layer.parameters())

    @property
    def is_plain(self) -> bool:
        """True for layers whose weights and forwards are as they were made."""
        check = are_plain_experts if self.part == EXPERTS else is_plain
        return all(check(layer) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of a model, and why parts of it stay whole.

    Attributes:
        groups: the groups.
        reasons: for each part that stays whole, why.
    """

    groups: list[Group] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    _signs: list[list[Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_signs", list(self._read_signs()))

    @property
    def is_current(self) -> bool:
        """True unless layers of a group were replaced, or changed, since."""
        return all(now == then for now, then in zip(self._read_signs(), self._signs, strict=True))

    def _read_signs(self) -> Iterator[list[Any]]:
        """Yield what changes with the layers: places, classes, forwards, hooks, shapes of weights.

        By functions in C, over all layers: every answer of several ranks begins with it, and asking
        each layer whether it is plain takes milliseconds of its first token.
        """
        owners = [owner for group in self.groups for owner, _ in group.owners]
        names = [name for group in self.groups for _, name in group.owners]
        layers = [layer for group in self.groups for layer in group.layers]
        own = [*map(vars, layers)]
        yield [*map(id, map(dict.get, map(_MODULES, map(vars, owners)), names))]
        yield [*map(type, layers)]
        yield [*map(contains, own, repeat("forward"))]
        yield [*map(len, chain.from_iterable(map(_HOOKS, own)))]
        yield [*map(id, chain.from_iterable(map(dict.values, map(_MODULES, own))))]
        weights = [*chain.from_iterable(map(dict.values, map(_PARAMETERS, own)))]
        # Only weights of these classes are asked for more.
        yield [*map(type, weights)]
        present = [weight for weight in weights if weight is not None]
        yield [*map(_KIND, present)]
        yield [*map(Tensor.stride, present)]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that can be sliced."""
        present = {group.part for group in self.groups}
        return tuple(part for part in PARTS if part in present)


def own_range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return a rank's share of `size` elements, as (first, stop): aligned, as even as possible."""
    step = ALIGNMENT if size >= ALIGNMENT * ranks else 1
    steps = -(-size // step)
    first, stop = (steps * number // ranks * step for number in (rank, rank + 1))
    return min(first, size), min(stop, size)


def padded_range(size: int, ranks: int, rank: int) -> tuple[int, int, int]:
    """Return a rank's share of the vocabulary, as (first, stop, most elements of any rank)."""
    most = padded_share(size, ranks)
    return min(rank * most, size), min((rank + 1) * most, size), most


def is_plain(module: Any) -> bool:
    """True for a linear layer as torch or we made it: no adapter, weights in place, no others'
    quantization."""
    return (
        type(module) in (nn.Linear, Fp8Linear)
        and type(module.weight) is nn.Parameter
        and module.weight.is_floating_point()
        and module.weight.stride(1) == 1
        and module.weight.device.type != "meta"
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def find(handle: Any, ranks: int) -> Groups:
    """Find what of a `ModelHandle`'s model can be sliced over `ranks` ranks."""
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    parents = _parents(handle)
    for part, found in (
        (ATTENTION, _attention(handle, parents, ranks)),
        (MLP, _mlps(handle, parents, ranks)),
        (EXPERTS, _experts(parents, ranks)),
        (HEAD, _head(handle, ranks)),
    ):
        if isinstance(found, str):
            reasons[part] = found
        else:
            groups += found
    return Groups(groups=groups, reasons=reasons)


@dataclass
class _Parent:
    """A module, and those of its children that the tensor-parallel plan shards."""

    name: str
    module: Any
    styles: dict[str, str] = field(default_factory=dict)

    @property
    def is_attention(self) -> bool:
        is_inside = hasattr(self.module, "layer_idx") and "experts" not in self.styles
        return is_inside or "o_proj" in self.styles


def _parents(handle: Any) -> list[_Parent]:
    parents: dict[str, _Parent] = {}
    if not getattr(handle.model, "tp_plan", None):
        return []
    for name, _, style in tensor_parallel.layers(handle.model):
        parent, _, child = name.rpartition(".")
        if parent not in parents:
            parents[parent] = _Parent(parent, handle.decoder.get_submodule(parent))
        parents[parent].styles[child] = style
    return list(parents.values())


def _attention(handle: Any, parents: list[_Parent], ranks: int) -> list[Group] | str:
    attentions = [parent for parent in parents if parent.is_attention]
    shapes: list[LayerKVShape | None] = handle.layer_shapes
    if not handle.probe_result.reads_own_keys or any(
        shape is None or shape.expands for shape in shapes
    ):
        return "its layers do not simply read their own keys"
    if len(attentions) != len(shapes):
        return "it has no tensor-parallel plan for its attention heads"
    groups = []
    for parent in attentions:
        shape = shapes[parent.module.layer_idx]
        assert shape is not None
        reason = _odd_attention(parent, shape, ranks)
        if reason is not None:
            return reason
        groups.append(Group.of(ATTENTION, parent.module, *tensor_parallel.ATTENTION))
    return groups


def _odd_attention(parent: _Parent, shape: LayerKVShape, ranks: int) -> str | None:
    """Return why an attention module cannot be sliced by heads, None if it can."""
    if parent.styles != tensor_parallel.ATTENTION:
        return "its tensor-parallel plan does not shard the attention heads"
    layers = [getattr(parent.module, name) for name in tensor_parallel.ATTENTION]
    if not all(is_plain(layer) for layer in layers):
        return f"{parent.name} has adapters, quantized weights or weights elsewhere"
    odd = tensor_parallel.weight_for_each_head(parent.module)
    odd = odd or _weight_over_heads(parent.module, {shape.k_size, shape.v_size})
    if odd is not None:
        return f"its attention has weights for each head ({odd})"
    q, k, v, o = layers
    heads = q.out_features // shape.k_size
    sizes = (heads * shape.k_size, shape.k_heads * shape.k_size, shape.v_heads * shape.v_size)
    if (
        shape.k_heads != shape.v_heads
        or (q.out_features, k.out_features, v.out_features) != sizes
        or o.in_features != heads * shape.v_size
    ):
        return "its projections are not made of heads alone"
    for number, kind in ((heads, "query"), (shape.k_heads, "KV")):
        if number % ranks:
            return f"its {number} {kind} heads do not divide by {ranks} ranks"
    return None


def _weight_over_heads(attention: nn.Module, head_sizes: set[int]) -> str | None:
    """Return the name of a weight that is neither a projection's nor a norm's of single heads."""
    for name, weight in attention.named_parameters():
        owner, _, rest = name.partition(".")
        if owner in tensor_parallel.ATTENTION or weight.numel() == 1:
            continue
        # The module's own weights are for each head, such as sinks, whatever their size.
        if not rest or weight.numel() not in head_sizes:
            return name
    return None


def _mlps(handle: Any, parents: list[_Parent], ranks: int) -> list[Group] | str:
    if tensor_parallel.needs_whole_width(handle.config):
        return "its MLP needs its whole width at once"
    groups = []
    for parent in parents:
        lasts = [name for name, style in parent.styles.items() if style == "rowwise"]
        outputs = [name for name, style in parent.styles.items() if style == "colwise"]
        if parent.is_attention or len(lasts) != 1 or not outputs:
            continue
        group = Group.of(MLP, parent.module, *outputs, *lasts)
        if not group.is_plain:
            return f"{parent.name} has adapters, quantized weights or weights elsewhere"
        width = group.layers[-1].in_features
        if any(layer.out_features != width for layer in group.layers[:-1]):
            return f"{parent.name} has layers of several widths"
        if width < ranks:
            return f"{parent.name} has width {width}, for {ranks} ranks"
        groups.append(group)
    return groups or "it has no tensor-parallel plan for plain MLPs"


def _experts(parents: list[_Parent], ranks: int) -> list[Group] | str:
    # Most models have none, which is no reason for anything.
    groups = [
        Group.of(EXPERTS, parent.module, name)
        for parent in parents
        for name, style in parent.styles.items()
        if style == "experts"
    ]
    for group in groups:
        if not group.is_plain:
            return "its experts have a layout that is not known, or weights elsewhere"
        width = group.layers[0].down_proj.shape[2]
        if width < ALIGNMENT * ranks or width % ALIGNMENT:
            return (
                f"its experts have width {width}, which {ranks} ranks do not share in multiples of"
                f" {ALIGNMENT}"
            )
    return groups


def _head(handle: Any, ranks: int) -> list[Group] | str:
    head = handle.model.get_output_embeddings()
    owner = next(
        (
            (module, name)
            for module in handle.model.modules()
            for name, child in module.named_children()
            if child is head
        ),
        None,
    )
    if head is None or owner is None or not is_plain(head):
        return "its language-model head is not a plain linear layer"
    if padded_range(head.out_features, ranks, ranks - 1)[0] >= head.out_features:
        return f"its vocabulary has {head.out_features} entries, for {ranks} ranks"
    return [Group.of(HEAD, *owner)]
