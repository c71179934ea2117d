"""A layer's experts, which a compiled step of one token multiplies by a kernel of ours."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from star_attention.hf.execution.sliced_experts import is_sliced
from star_attention.hf.loading.plain_experts import are_plain_experts
from star_attention.linear import triton_experts

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PROBE = 60.0
"""Inputs of the gate that are tried, at most: beyond the limits that some models have."""


class _RowExperts(nn.Module):
    """Experts that, where they are compiled, multiply a single row by `triton_experts`."""

    activation: str
    gate_up_proj: Tensor
    down_proj: Tensor
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and hidden_states.numel() == hidden_states.shape[-1]:
            row: Tensor = triton_experts.experts(
                hidden_states,
                self.gate_up_proj,
                self.down_proj,
                top_k_index,
                top_k_weights,
                self.activation,
                [],
                None,
            )
            return row
        stock: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
        return stock


def find(layers: list[Any]) -> list[tuple[nn.Module, type[nn.Module], type[nn.Module]]]:
    """Return the experts that can use the kernel, each with its class and that of the kernel."""
    modules = [module for layer in layers for module in layer.modules()]
    return [
        (module, type(module), row) for module in modules if (row := row_class(module)) is not None
    ]


def row_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class with which experts use the kernel, or None if it does not know them."""
    if not are_plain_experts(module) or is_sliced(module):
        return None
    if getattr(module, "_is_expert_parallel", False):
        return None
    experts: Any = module
    up, down = experts.gate_up_proj, experts.down_proj
    if up.dtype != down.dtype or up.dtype not in _DTYPES:
        return None
    activation = _activation(module)
    stock: Any = type(module)
    return None if activation is None else _row_class(stock, activation)


@functools.cache
def _row_class(stock: type[nn.Module], activation: str) -> type[nn.Module]:
    return type(_RowExperts.__name__, (_RowExperts, stock), dict(activation=activation))


def _activation(module: Any) -> str | None:
    """Return the name of the function that gates the hidden layer: the one that gives the same.

    Models also gate in other ways: with limits, with other factors, or with interleaved halves.
    """
    width = module.down_proj.shape[2]
    gate = torch.linspace(-_PROBE, _PROBE, width)
    up = torch.linspace(_PROBE, -_PROBE / 2, width)
    with torch.no_grad():
        got = module._apply_gate(torch.cat([gate, up])[None].to(module.down_proj.device)).cpu()[0]
    for name, function in triton_experts.ACTIVATIONS.items():
        right = function(gate) * up
        if got.shape == right.shape and torch.allclose(got, right, rtol=1e-5, atol=1e-5):
            return name
    return None
