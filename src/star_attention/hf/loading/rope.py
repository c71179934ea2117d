"""Rotary frequencies that depend on the length (LongRoPE, dynamic NTK), pinned for a whole context.

transformers derives that length from the positions of each forward, so that two blocks of one
context, or a context and its query, would be rotated by different frequencies. A pinned copy of the
rotary module replaces the original, during our own forwards only.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from star_attention.errors import InvalidInputError
from star_attention.hf.loading.positions import rope_parameters, type_of

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def _types(module: nn.Module) -> dict[str | None, str]:
    """Return the rope type of each layer type; the key is None if all layers share one."""
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, str):
        return {None: rope_type}
    return dict(rope_type) if isinstance(rope_type, dict) else {}


def _depends_on_length(rope_type: str) -> bool:
    return any(name in rope_type for name in _LENGTH_DEPENDENT)


def is_length_dependent(module: nn.Module) -> bool:
    """Return True for a rotary module whose frequencies depend on the length of a forward."""
    return any(_depends_on_length(rope_type) for rope_type in _types(module).values())


def length_dependent(decoder: nn.Module) -> list[nn.Module]:
    """Return the rotary modules whose frequencies depend on the length of a forward."""
    return [module for module in decoder.modules() if is_length_dependent(module)]


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


def unknown_types(config: Any) -> list[str]:
    """Return reasons against a text config's rope types that transformers has no formula for."""
    known = ["default", *sorted(ROPE_INIT_FUNCTIONS)]
    names = {type_of(parameters) for parameters in rope_parameters(config)}
    return [
        f"its config names the rope type {name!r} (rope_parameters or rope_scaling), which this"
        f" version of transformers does not know; it knows {', '.join(known)}"
        for name in sorted(names - {*known, "mrope"})
        if not hasattr(config, f"_validate_{name}_rope_parameters")
    ]


def unscaled_length(modules: list[nn.Module], *, longrope_only: bool = False) -> int | None:
    """Return the most tokens that length-dependent modules rotate as in their first training.

    Args:
        modules: rotary modules, from `length_dependent`.
        longrope_only: leave out dynamic NTK, whose frequencies change gradually beyond it.
    """
    lengths = []
    for module in modules:
        config: Any = module.config
        for parameters in rope_parameters(config):
            match type_of(parameters):
                case "longrope":
                    lengths.append(parameters["original_max_position_embeddings"])
                case name if "dynamic" in name and not longrope_only:
                    lengths.append(config.max_position_embeddings)
    return min(lengths, default=None)


def check_built_from_config(decoder: nn.Module) -> None:
    """Check that rotary frequencies are those of the config that modules hold.

    Raises:
        InvalidInputError: rotary settings were edited after the model was made.
    """
    for module in decoder.modules():
        types, config = _types(module), getattr(module, "config", None)
        if types and config is not None and not _is_built_from(module, types, config):
            settings = {
                name: value
                for name, value in (getattr(config, "rope_parameters", None) or {}).items()
                if not isinstance(value, list)
            }
            raise InvalidInputError(
                f"the config's rotary settings are not those that the model was made with: its"
                f" frequencies are {' and '.join(sorted(set(types.values())))}, the config says"
                f" {settings}; edits after loading change nothing: give the settings to"
                ' from_pretrained, model_kwargs={"rope_scaling": {...}}, or --rope-scaling'
            )


def edited_frequencies(decoder: nn.Module) -> str | None:
    """Return a checksum of frequencies that are not those of the config; None if all are.

    Those that depend on the length are computed from the config, whatever the buffers hold.
    """
    digest, is_edited = hashlib.sha256(), False
    for module in decoder.modules():
        types, config = _types(module), getattr(module, "config", None)
        fresh = _built_from(module, config) if types and config is not None else None
        if fresh is None:
            continue
        for layer_type, rope_type in types.items():
            name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
            if _depends_on_length(rope_type) or _is_close(module, fresh, name):
                continue
            is_edited = True
            # Devices round differently.
            rounded = getattr(module, name).detach().to(torch.bfloat16).view(torch.int16)
            digest.update(rounded.cpu().numpy().tobytes())
    return digest.hexdigest() if is_edited else None


def _built_from(module: Any, config: Any) -> Any:
    """Make a rotary module of a config; None if its constructor takes more, or refuses it."""
    try:
        return type(module)(config=copy.deepcopy(config))
    except Exception:
        # Constructors of a model's own code may raise anything.
        return None


def _is_built_from(module: Any, types: dict[str | None, str], config: Any) -> bool:
    """Compare a rotary module with a new one of its config."""
    fresh = _built_from(module, config)
    if fresh is None:
        stated = {type_of(parameters) for parameters in rope_parameters(config)}
        return set(types.values()) <= stated
    if _types(fresh) != types:
        return False
    for layer_type, rope_type in types.items():
        prefix = "" if layer_type is None else f"{layer_type}_"
        # Never written, while a length-dependent module changes the other while it runs.
        name = f"{prefix}original_inv_freq"
        if not hasattr(module, name):
            if _depends_on_length(rope_type):
                continue
            name = f"{prefix}inv_freq"
        factors = [getattr(each, f"{prefix}attention_scaling", 1.0) for each in (module, fresh)]
        if not _is_close(module, fresh, name) or not math.isclose(*factors):
            return False
    return True


def _is_close(module: Any, fresh: Any, name: str) -> bool:
    """Return True if frequencies are equal up to the rounding of devices and precisions."""
    own, new = (getattr(each, name, None) for each in (module, fresh))
    if not isinstance(own, Tensor) or not isinstance(new, Tensor) or own.is_meta or new.is_meta:
        return True
    tolerance = max(1e-4, 4 * torch.finfo(own.dtype).eps)
    return own.shape == new.shape and torch.allclose(
        own.detach().float().cpu(), new.detach().float().cpu(), rtol=tolerance, atol=0
    )
