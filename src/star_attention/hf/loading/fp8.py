"""Which linear layers of a model are loaded in fp8, and their quantizing, one by one.

They are the plain linear layers in the decoder's layers, except its first and its last one: what
those get wrong weighs most (docs/models.md has what was measured). Embeddings, the language-model
head and norms are elsewhere or of another kind; what `_KEPT` names stays as it is, and so do
experts whose weights are one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.execution.layer_part import layers_of
from star_attention.linear.fp8 import Fp8Linear
from star_attention.planning.model_shape import FP8_ENDS, FP8_STEP

AS_LOADED = "as loaded"

_KEPT = ("gate", "router", "kv_b_proj")
"""Names of layers that keep their precision: those that choose experts, where a small error may
choose another one, and the expansion of MLA, whose matrix phase 2 reads (`hf.cache.latent`)."""


def layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers of a model that are loaded in fp8, with their names in the decoder."""
    decoder = model.get_decoder()
    inner = layers_of(decoder)[FP8_ENDS:-FP8_ENDS]
    inside = {id(module) for layer in inner for module in layer.modules()}
    for name, module in decoder.named_modules():
        if id(module) in inside and _can_be_quantized(name, module):
            yield name, module


def _can_be_quantized(name: str, module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and module.in_features % FP8_STEP == module.out_features % FP8_STEP == 0
        and not any(part in _KEPT for part in name.split("."))
    )


def quantize(
    model: Any,
    found: Iterable[tuple[str, nn.Linear]],
    device: str | torch.device | None,
    *,
    back_to: str | None = None,
) -> None:
    """Quantize layers of a loaded model, in place.

    Each is moved to the device and quantized there, before the next one: a device never holds the
    plain weights of more than one layer, besides those that it had before.

    Args:
        model: the model.
        found: what `layers` yields.
        device: where the layers are quantized; None for where each of them is.
        back_to: where they go afterwards; None to stay.

    Raises:
        UnsupportedModelError: there are none.
        InvalidInputError: a layer's weights are not in memory, or are moved by others.
    """
    found = list(found)
    if not found:
        raise UnsupportedModelError(
            f'{type(model).__name__} with weights="fp8"',
            [
                "between its first and its last layer there are no plain linear layers with sizes"
                f" in steps of {FP8_STEP}"
            ],
        )
    for name, layer in found:
        if layer.weight.is_meta or "forward" in vars(layer):
            raise InvalidInputError(
                'weights="fp8" does not work with weights that are moved for each forward'
                f" ({name}); leave out device_map, and use tensor_parallel for a model that one"
                " device cannot hold"
            )
    for _, layer in found:
        Fp8Linear.convert(layer, device)
        if back_to is not None:
            layer.to(back_to)
    model.save_pretrained = _refuse_to_save


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InvalidInputError(
        'this model was loaded with weights="fp8", which files cannot hold; load it without'
        " weights to save it"
    )


def precision(model: nn.Module) -> str:
    """Return the precision of a model's linear layers: "fp8", or `AS_LOADED`."""
    is_fp8 = any(isinstance(module, Fp8Linear) for module in model.modules())
    return "fp8" if is_fp8 else AS_LOADED
