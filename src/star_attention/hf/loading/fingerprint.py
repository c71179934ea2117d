"""Cheap signs that a model, its config or its tokenizer have changed since they were last seen.

A context in memory is checked with them at every use. They read no whole weights: for each tensor
the version that torch counts, the address, and a few elements (on a GPU: of a few tensors), which a
write through `.data`, not counted by torch, changes unless it leaves out exactly these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ctypes import Array, c_char
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

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
    if last is None or not last.is_current():
        last = _LAST[model] = _Reading(model)
    return last.sign


def addresses(model: nn.Module) -> int:
    """Return a hash of where a model's parameters are."""
    last = _LAST.get(model)
    if last is None or not last.is_in_place():
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
    a first token. It holds no module and no tensor.

    Attributes:
        sign: a hash of all of it.
        addresses: a hash of where the parameters are.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [*modules_of(model)]
        # Frequencies that a model chooses anew in its own forwards are left out.
        rotary = [module for module in modules if rope.is_length_dependent(module)]
        self._whole = [ref(module) for module in modules if module not in rotary]
        self._rotary = [ref(module) for module in rotary]
        registered = self._registered()
        assert registered is not None, "the model is alive"
        self._ids = [*map(id, registered)]
        tensors_at = [index for index, each in enumerate(registered) if isinstance(each, Tensor)]
        self._plain = [index for index in tensors_at if type(registered[index]) in _PLAIN]
        self._wrapped = [index for index in tensors_at if type(registered[index]) not in _PLAIN]
        self._at = [
            index for index, each in enumerate(registered) if isinstance(each, nn.Parameter)
        ]
        self.addresses = self._addresses(registered)
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
        self.sign = hash((*self._ids, *self._layout, *self._bytes))

    def is_current(self) -> bool:
        """True if the model is still as it was."""
        registered = self._same()
        if registered is None:
            return False
        tensors = self._tensors(registered)
        # First, because memory may only be read where it still is a tensor's.
        return _layout(tensors) == self._layout and self._read(tensors) == self._bytes

    def is_in_place(self) -> bool:
        """True if the model has the same tensors, its parameters where they were."""
        registered = self._same()
        return registered is not None and self._addresses(registered) == self.addresses

    def _addresses(self, registered: list[Any]) -> int:
        return hash(tuple(registered[index].data_ptr() for index in self._at))

    def _same(self) -> list[Any] | None:
        """Return what is registered; None if that has changed."""
        registered = self._registered()
        if registered is None or [*map(id, registered)] != self._ids:
            return None
        return registered

    def _registered(self) -> list[Any] | None:
        """Return the parameters, buffers and modules of all modules; None if one has gone."""
        whole, rotary = ([each() for each in refs] for refs in (self._whole, self._rotary))
        if None in whole or None in rotary:
            return None
        tables = chain(map(_WHOLE, map(vars, whole)), map(_ROTARY, map(vars, rotary)))
        # Most are empty.
        filled = filter(None, chain.from_iterable(tables))
        return [*chain.from_iterable(map(dict.values, filled))]

    def _tensors(self, registered: list[Any]) -> list[Tensor]:
        """Return the tensors of what is registered, quantized ones as their parts."""
        tensors = [registered[index] for index in self._plain]
        for index in self._wrapped:
            tensors += plain_parts(registered[index])
        return tensors

    def _read(self, tensors: list[Tensor]) -> list[bytes]:
        samples = _by_kind(_samples(tensors[index] for index in self._few))
        return [b"".join(self._places), *(_bytes(torch.cat(each)) for each in samples.values())]


_PLAIN = (Tensor, nn.Parameter)
_WHOLE = itemgetter("_parameters", "_buffers", "_modules")
_ROTARY = itemgetter("_parameters", "_modules")
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


def _layout(tensors: list[Tensor]) -> list[Any]:
    """Return where and how the elements of tensors lie, and how often they were written.

    By functions in C, over all tensors: half the time of asking each tensor for all of it.
    """
    try:
        versions = [*map(_VERSION, tensors)]
    except RuntimeError:
        # Tensors of inference mode count none.
        versions = [*map(_version, tensors)]
    return [
        *map(Tensor.data_ptr, tensors),
        *map(Tensor.is_contiguous, tensors),
        *map(_SIZE, tensors),
        *versions,
    ]


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
