"""Rotary frequencies that depend on the length (LongRoPE, dynamic NTK), pinned for a whole context.

transformers derives that length from the positions of each forward, so that two blocks of one
context, or a context and its query, would be rotated by different frequencies. A pinned copy of the
rotary module replaces the original, during our own forwards only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def _types(module: nn.Module) -> dict[str | None, str]:
    """Return the rope type of each layer type; the key is None if all layers share one."""
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, str):
        return {None: rope_type}
    return dict(rope_type) if isinstance(rope_type, dict) else {}


def _depends_on_length(rope_type: str) -> bool:
    return any(name in rope_type for name in _LENGTH_DEPENDENT)


def length_dependent(decoder: nn.Module) -> list[nn.Module]:
    """Return the rotary modules whose frequencies depend on the length of a forward."""
    return [m for m in decoder.modules() if any(_depends_on_length(t) for t in _types(m).values())]


def _pinned_copy(module: Any, length: int) -> Any:
    """Copy a rotary module, with frequencies for exactly `length` tokens and buffers of its own."""
    pinned = copy.copy(module)
    pinned.__dict__.pop("forward", None)
    pinned._buffers = dict(module._buffers)
    types = _types(module)
    for layer_type, rope_type in types.items():
        if not _depends_on_length(rope_type):
            continue
        prefix = "" if layer_type is None else f"{layer_type}_"
        layer = {} if layer_type is None else {"layer_type": layer_type}
        current: Tensor = getattr(module, f"{prefix}inv_freq")
        # Dynamic NTK is called "dynamic"; transformers also finds the word within longer names.
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](
            module.config, current.device, seq_len=length, **layer
        )
        pinned._buffers[f"{prefix}inv_freq"] = inv_freq.to(current.device, current.dtype)
        setattr(pinned, f"{prefix}attention_scaling", scaling)
    # With "default", transformers does not choose the frequencies again.
    if None in types:
        pinned.rope_type = "default"
    else:
        pinned.rope_type = {
            name: "default" if _depends_on_length(t) else t for name, t in types.items()
        }
    return pinned


@contextmanager
def pinned(
    modules: list[nn.Module], length: int | None, active: Callable[[], bool]
) -> Iterator[None]:
    """Rotate by the frequencies of `length` tokens inside the context.

    The modules' own buffers are never written, and nothing is left in the model afterwards.

    Args:
        modules: rotary modules, from `length_dependent`.
        length: number of tokens; None changes nothing.
        active: True in the thread whose forwards are pinned; others use the original module.
    """
    if length is None or not modules:
        yield
        return
    # accelerate sets a forward of its own on modules that it moves between devices.
    originals = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        stock, pinned_module = module.forward, _pinned_copy(module, length)

        def forward(
            *args: Any, _stock: Any = stock, _pinned: Any = pinned_module, **kwargs: Any
        ) -> Any:
            return _pinned.forward(*args, **kwargs) if active() else _stock(*args, **kwargs)

        module.forward = forward
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            if original is None:
                del module.forward
            else:
                module.forward = original


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary settings of a text config, one entry per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        return [value for value in parameters.values() if isinstance(value, dict)]
    return [parameters]


def max_positions(config: Any) -> int | None:
    """Return the number of positions that a model has; None if the config sets no limit.

    If scaling stretches the original length and the config still states the original, this is the
    stretched length.
    """
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int):
        return None
    stretched = stated
    for parameters in rope_parameters(config):
        factor = parameters.get("factor")
        original = parameters.get("original_max_position_embeddings") or stated
        if parameters.get("rope_type", "default") != "default" and factor:
            stretched = max(stretched, int(original * factor))
    return stretched
