"""Tiny models with linear layers in fp8, and plain ones with the same numbers.

Forwards of few tokens multiply activations as they are, so that both have the same answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from star_attention.hf.loading import fp8
from star_attention.linear.fp8 import Fp8Linear
from tests.families import build

SIZES: dict[str, Any] = dict(
    hidden_size=64,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
)
"""Sizes with which every projection of attention and of an MLP is quantized."""


def quantized(name: str, **sizes: Any) -> Any:
    """Return a family's tiny model with linear layers in fp8."""
    model = build(name, **(sizes or SIZES))
    fp8.quantize(model, fp8.layers(model), None)
    return model


def plain(name: str, **sizes: Any) -> Any:
    """Return the same with plain weights of the same values."""
    model, other = build(name, **(sizes or SIZES)), quantized(name, **sizes)
    weights = dict(model.named_modules())
    with torch.no_grad():
        for path, module in other.named_modules():
            if isinstance(module, Fp8Linear):
                weights[path].weight.copy_(dequantized(module))
    return model


def dequantized(layer: nn.Module) -> torch.Tensor:
    """Return the values of a layer's weight, fp32."""
    assert isinstance(layer, Fp8Linear)
    return layer.weight.float() * layer.scale[:, None]
