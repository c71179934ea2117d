"""Cheap signs that a model, its config or its tokenizer have changed since they were last seen.

A context in memory is checked with them at every use. They read no whole weights: for each tensor
the version that torch counts, the address, and a few elements (on a GPU: of a few tensors), which a
write through `.data`, not counted by torch, changes unless it leaves out exactly these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import Array, c_char
from itertools import chain, compress
from operator import attrgetter, itemgetter, not_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from star_attention.hf.loading import rope
from star_attention.hf.loading.checksum import plain_parts

IRRELEVANT_FIELDS = {
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of a config that no key or value depends on; all others are compared."""

_ELEMENTS = 16
"""Elements read from each tensor on a device, spread over it, the first among them."""

_TENSORS = 16
"""Tensors on a device that elements are read from, evenly spread over the model."""

_BYTES = 32
"""Bytes read in each of three places of a tensor on the CPU."""

_PROBE = "The 2 quick, brown foxes don't jump:\n\n  naïve Straße, 東京 🦊\t<end>\r\n= [1] + {x_y}"
"""Text whose tokens change with most changes of merges, normalizers and splits."""


_RULES_OF_MODELS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
    "max_input_chars_per_word",
)
"""Attributes of the models of tokenizers, beside their vocabulary."""


def weights(model: nn.Module) -> int:
    """Return a hash that changes with a model's parameters and buffers."""
    last = _LAST.get(model)
    if last is None or not last.is_current(model):
        last = _LAST[model] = _Reading(model)
    return last.sign


def addresses(model: nn.Module) -> int:
    """Return a hash of where a model's parameters are."""
    last = _LAST.get(model)
    if last is None or not last.is_in_place(model):
        last = _LAST[model] = _Reading(model)
    return last.addresses


def signs(tensor: Tensor) -> tuple[Any, ...]:
    """Return a value that changes with one tensor."""
    result: list[Any] = [id(tensor)]
    for part in plain_parts(tensor):
        result += (part.data_ptr(), _version(part), part.shape, part.dtype)
        if _is_near(part):
            result.append(b"".join(_places(part)))
        else:
            result += [_bytes(sample.contiguous()) for sample in _samples([part])]
    return tuple(result)


def config(text_config: Any) -> int:
    """Return a hash that changes with a config's fields, edited in place or replaced."""
    fields = [
        item
        for item in vars(text_config).items()
        if item[0] not in IRRELEVANT_FIELDS and not item[0].startswith("_")
    ]
    return hash(repr(fields))


def tokenizer(tokenizer: Any) -> tuple[Any, ...]:
    """Return a value that changes with a tokenizer's rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return id(tokenizer), len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return (
        id(tokenizer),
        id(backend),
        backend.get_vocab_size(with_added_tokens=True),
        backend.get_vocab_size(with_added_tokens=False),
        repr(backend.normalizer),
        repr(backend.pre_tokenizer),
        repr(backend.post_processor),
        repr(backend.decoder),
        *(getattr(backend.model, name, None) for name in _RULES_OF_MODELS),
        tuple(backend.encode(_PROBE).ids),
    )


class _Reading:
    """What was read of a model: its modules, which tensors they have, and signs of each tensor.

    To read it again takes a third of the time of walking through the model, which is noticeable in
    a first token. It holds no module and no tensor, and of long lists only hashes: to compare
    numbers that nobody has looked at for a while, memory is slow.

    Attributes:
        sign: a hash of all of it.
        addresses: a hash of where the parameters are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._levels, modules = _levels_of(model)
        # Frequencies that a model chooses anew in its own forwards are left out.
        self._have_buffers = _picker(
            [at for at, each in enumerate(modules) if not rope.is_length_dependent(each)]
        )
        tables = [*map(vars, modules)]
        parameters, buffers = _values(_PARAMETERS, tables), self._buffers(tables)
        self._parameters, self._others = _ids(parameters), _ids(buffers)
        self._present = _picker([at for at, each in enumerate(parameters) if each is not None])
        self.addresses = self._addresses(parameters)
        registered = [*parameters, *buffers]
        tensors_at = [index for index, each in enumerate(registered) if isinstance(each, Tensor)]
        is_plain = [type(registered[index]) in _PLAIN for index in tensors_at]
        self._plain = _picker([*compress(tensors_at, is_plain)])
        self._wrapped = _picker([*compress(tensors_at, map(not_, is_plain))])
        tensors = self._tensors(registered)
        self._layout = _layout(tensors)
        is_near = [_is_near(tensor) for tensor in tensors]
        self._places = [
            place
            for tensor, near in zip(tensors, is_near, strict=True)
            if near
            for place in _places(tensor)
        ]
        elsewhere = [index for index, near in enumerate(is_near) if not near]
        # Reading all of them would take a fifth of a first token on a GPU.
        self._few = elsewhere[:: -(-len(elsewhere) // _TENSORS) or 1]
        self._bytes = self._read(tensors)
        structure = *(ids for ids, _ in self._levels), self._parameters, self._others
        self.sign = hash((*structure, self._layout, *self._bytes))

    def is_current(self, model: nn.Module) -> bool:
        """True if the model is still as it was."""
        tables = self._tables(model)
        if tables is None:
            return False
        parameters, buffers = _values(_PARAMETERS, tables), self._buffers(tables)
        if (_ids(parameters), _ids(buffers)) != (self._parameters, self._others):
            return False
        tensors = self._tensors([*parameters, *buffers])
        # First, because memory may only be read where it still is a tensor's.
        return _layout(tensors) == self._layout and self._read(tensors) == self._bytes

    def is_in_place(self, model: nn.Module) -> bool:
        """True if the model has the same modules and parameters, and these are where they were."""
        tables = self._tables(model)
        if tables is None:
            return False
        parameters = _values(_PARAMETERS, tables)
        same = _ids(parameters) == self._parameters
        return same and self._addresses(parameters) == self.addresses

    def _tables(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """Return the attributes of all modules; None if these are others than before."""
        level: tuple[nn.Module, ...] = (model,)
        tables: list[dict[str, Any]] = []
        for children_before, new in self._levels:
            of_level = [*map(vars, level)]
            children = _values(_MODULES, of_level)
            if _ids(children) != children_before:
                return None
            tables += of_level
            level = new(children)
        return tables

    def _buffers(self, tables: list[dict[str, Any]]) -> list[Any]:
        return _values(_BUFFERS, self._have_buffers(tables))

    def _addresses(self, parameters: list[Any]) -> int:
        return hash(tuple(map(Tensor.data_ptr, self._present(parameters))))

    def _tensors(self, registered: list[Any]) -> list[Tensor]:
        """Return the tensors of what is registered, quantized ones as their parts."""
        tensors = [*self._plain(registered)]
        for tensor in self._wrapped(registered):
            tensors += plain_parts(tensor)
        return tensors

    def _read(self, tensors: list[Tensor]) -> list[bytes]:
        samples = _by_kind(_samples(tensors[index] for index in self._few))
        return [b"".join(self._places), *(_bytes(torch.cat(each)) for each in samples.values())]


_Picker = Callable[[Sequence[Any]], tuple[Any, ...]]


def _picker(indices: list[int]) -> _Picker:
    """Return what takes the items at some places of a list."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda items: tuple(items[index] for index in indices)


def _levels_of(model: nn.Module) -> tuple[list[tuple[int, _Picker]], list[nn.Module]]:
    """Return the levels of a model's tree and, level by level, its modules, each once.

    Of each level, `_ids` of its modules' children, and what takes of these the next level's.
    """
    levels: list[tuple[int, _Picker]] = []
    modules, level, seen = [model], (model,), {model}
    while level:
        children = _values(_MODULES, map(vars, level))
        new = []
        for at, child in enumerate(children):
            if child is not None and child not in seen:
                seen.add(child)
                new.append(at)
        picker = _picker(new)
        levels.append((_ids(children), picker))
        level = picker(children)
        modules += level
    return levels, modules


def _values(of: Callable[[Any], Any], tables: Iterable[dict[str, Any]]) -> list[Any]:
    """Return what modules hold in one of their tables, of all modules in one list."""
    # Most are empty.
    return [*chain.from_iterable(map(dict.values, filter(None, map(of, tables))))]


def _ids(values: list[Any]) -> int:
    return hash(tuple(map(id, values)))


_PLAIN = (Tensor, nn.Parameter)
_PARAMETERS, _BUFFERS, _MODULES = map(itemgetter, ("_parameters", "_buffers", "_modules"))
_SIZE, _VERSION = attrgetter("nbytes", "dtype"), attrgetter("_version")

_LAST: WeakKeyDictionary[nn.Module, _Reading] = WeakKeyDictionary()
"""For each model, what was read of it the last time."""


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all within it, each once.

    Not by `Module.modules`, which takes several times as long.
    """
    modules: list[nn.Module | None] = [model]
    seen: set[nn.Module] = set()
    while modules:
        module = modules.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        yield module
        modules.extend(vars(module)["_modules"].values())


def _layout(tensors: list[Tensor]) -> int:
    """Return a hash of where and how elements of tensors lie, and how often they were written.

    By functions in C, over all tensors: half the time of asking each tensor for all of it.
    """
    try:
        versions = [*map(_VERSION, tensors)]
    except RuntimeError:
        # Tensors of inference mode count none.
        versions = [*map(_version, tensors)]
    places = map(Tensor.data_ptr, tensors)
    return hash((*places, *map(Tensor.is_contiguous, tensors), *map(_SIZE, tensors), *versions))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_near(tensor: Tensor) -> bool:
    """True for a tensor whose memory Python can read."""
    return tensor.is_cpu and tensor.is_contiguous() and tensor.data_ptr() != 0


def _places(tensor: Tensor) -> Iterator[Array[c_char]]:
    """Yield the first, middle and last bytes of a contiguous tensor on the CPU, where they lie.

    By address: torch's own indexing takes ten times as long, noticeable in a first token.
    """
    size, address = tensor.nbytes, tensor.data_ptr()
    if size <= 3 * _BYTES:
        yield (c_char * size).from_address(address)
        return
    for start in (0, size // 2, size - _BYTES):
        yield (c_char * _BYTES).from_address(address + start)


@torch.no_grad()
def _samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    samples = []
    for tensor in tensors:
        size = tensor.numel()
        if not size or not tensor.data_ptr():
            continue
        if not tensor.is_contiguous():
            tensor = tensor.detach()[(0,) * (tensor.dim() - 1)].contiguous()
            size = tensor.numel()
        if tensor.itemsize == 1:
            # Numbers of one byte cannot be joined in every precision.
            tensor = tensor.detach().view(torch.uint8)
        count = min(_ELEMENTS, size)
        samples.append(tensor.as_strided((count,), (size // count,)))
    return samples


def _bytes(flat: Tensor) -> bytes:
    data: bytes = flat.view(torch.uint8).cpu().numpy().tobytes()
    return data


def _by_kind(tensors: list[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return groups
