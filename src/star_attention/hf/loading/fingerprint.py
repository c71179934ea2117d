"""Cheap signs that a model, its config or its tokenizer have changed since they were last seen.

A context in memory is checked with them at every use. They read no whole weights: for each tensor
the version that torch counts, the address, and a few elements (on a GPU: of a few tensors), which a
write through `.data`, not counted by torch, changes unless it leaves out exactly these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ctypes import string_at
from typing import Any

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
    signs: list[Any] = []
    elsewhere: list[Tensor] = []
    for tensor in _tensors(model):
        signs += (id(tensor), _version(tensor), tensor.data_ptr())
        if tensor.is_cpu and tensor.is_contiguous():
            signs += _bytes_on_cpu(tensor)
        else:
            elsewhere.append(tensor)
    # Reading all of them would take a fifth of a first token on a GPU.
    few = elsewhere[:: -(-len(elsewhere) // _TENSORS) or 1]
    for parts in _by_kind(_samples(few)).values():
        signs.append(_bytes(torch.cat(parts)))
    return hash(tuple(signs))


def signs(tensor: Tensor) -> tuple[Any, ...]:
    """Return a value that changes with one tensor."""
    result: list[Any] = [id(tensor)]
    for part in plain_parts(tensor):
        result += (part.data_ptr(), _version(part), part.shape, part.dtype)
        if part.is_cpu and part.is_contiguous():
            result += _bytes_on_cpu(part)
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


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, quantized ones as their parts; some maybe twice.

    Not by `named_parameters`, which takes several times as long. Frequencies that a model chooses
    anew in its own forwards are left out.
    """
    modules: list[nn.Module | None] = [model]
    seen: set[nn.Module] = set()
    while modules:
        module = modules.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        fields = vars(module)
        own = [*fields["_parameters"].values()]
        if fields["_buffers"] and not rope.is_length_dependent(module):
            own += fields["_buffers"].values()
        for tensor in own:
            if tensor is None:
                continue
            if type(tensor) is Tensor or type(tensor) is nn.Parameter:
                yield tensor
            else:
                yield from plain_parts(tensor)
        modules.extend(fields["_modules"].values())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _bytes_on_cpu(tensor: Tensor) -> tuple[bytes, ...]:
    """Return the first, middle and last bytes of a contiguous tensor.

    From its address: torch's own indexing takes ten times as long, noticeable in a first token.
    """
    size, address = tensor.nbytes, tensor.data_ptr()
    if size <= 3 * _BYTES:
        return (string_at(address, size),)
    return (
        string_at(address, _BYTES),
        string_at(address + size // 2, _BYTES),
        string_at(address + size - _BYTES, _BYTES),
    )


@torch.no_grad()
def _samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    samples = []
    for tensor in tensors:
        size = tensor.numel()
        if tensor.is_meta or not size:
            continue
        if not tensor.is_contiguous():
            tensor = tensor.detach()[(0,) * (tensor.dim() - 1)].contiguous()
            size = tensor.numel()
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
