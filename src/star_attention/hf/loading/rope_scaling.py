"""Rotary scaling that is given when a model is loaded, in place of its config's own.

transformers takes such settings as a whole, so that the base frequency (`rope_theta`) of the config
would be lost; here they replace the scaling alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from star_attention.errors import InvalidInputError, first_line, quote
from star_attention.hf.loading.positions import is_per_layer_type, rope_parameters, type_of
from star_attention.hf.loading.rope_words import FORM, check_numbers

_MODEL_OWN = ("rope_theta", "partial_rotary_factor", "mrope_section")
"""Settings that belong to the trained model, whatever scales it."""

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_HAS_ORIGINAL = ("yarn", "llama3", "longrope")
_OLD_NAMES = {"su": "longrope"}


def config_with_new_names(path: str | os.PathLike[str], location: dict[str, Any]) -> Any:
    """Load a config that names a rope type which transformers has given up, by its new name.

    Args:
        path: model folder; hub ids are left to transformers.
        location: arguments of `AutoConfig.from_pretrained` (revision, subfolder, ...).

    Returns:
        The config; None if there is no such name in it.
    """
    file = Path(path) / str(location.get("subfolder") or "") / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
        if not any(f'"{name}"' in text for name in _OLD_NAMES):
            return None
        raw = json.loads(text)
        settings = raw.get("text_config", raw).get("rope_scaling") or {}
        name = type_of(settings)
        if name not in _OLD_NAMES or raw["model_type"] not in CONFIG_MAPPING:
            return None
    except (OSError, ValueError, AttributeError, KeyError):
        # Whatever is wrong with the file, transformers says.
        return None
    settings.pop("type", None)
    settings["rope_type"] = _OLD_NAMES[name]
    return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)


def may_be_renamed(config: Any) -> bool:
    """Return True if a config's rope type may be another than its file's."""
    text = config.get_text_config(decoder=True)
    return any(type_of(p) in _OLD_NAMES.values() for p in rope_parameters(text))


def apply(config: Any, settings: dict[str, Any]) -> None:
    """Change the rotary scaling of a config, before its model is made.

    Args:
        config: the config, changed in place. Its base frequency stays unless `settings` has one.
        settings: rope_type, factor and so on; or such dicts by layer type, for models whose layer
            types differ. Otherwise full-attention layers are meant.

    Raises:
        InvalidInputError: a model without rotary positions, or settings that cannot work.
    """
    text = config.get_text_config(decoder=True)
    own = getattr(text, "rope_parameters", None)
    if not own:
        raise InvalidInputError(
            f"rope_scaling does not work with {text.model_type}: it has no rotary positions; leave"
            " it out"
        )
    by_layer = {name: value for name, value in settings.items() if isinstance(value, dict)}
    if is_per_layer_type(own):
        if not by_layer:
            by_layer = {"full_attention": settings}
        unknown = sorted(set(by_layer) - {name for name in own if isinstance(own[name], dict)})
        if unknown:
            raise InvalidInputError(
                f"rope_scaling names {unknown[0]} layers, but {text.model_type} has rotary settings"
                f" for {', '.join(sorted(own))}; give a dict by these names"
            )
        changed = {name: _merged(text, own[name], new, True) for name, new in by_layer.items()}
        text.rope_parameters = own | changed
    elif by_layer:
        raise InvalidInputError(
            f"rope_scaling has settings by layer type ({', '.join(by_layer)}), but the layers of"
            f" {text.model_type} share theirs; give one dict"
        )
    else:
        text.rope_parameters = _merged(text, own, settings, False)
    _complete(text)


def _merged(
    config: Any, own: dict[str, Any], settings: dict[str, Any], per_layer_type: bool
) -> dict[str, Any]:
    """Return new settings with what they leave to the config's own."""
    settings = dict(settings)
    old_name, own_type = settings.pop("type", None), type_of(own)
    name = settings.get("rope_type", old_name)
    if name is None and set(settings) - set(_MODEL_OWN):
        raise InvalidInputError(f"rope_scaling {settings} has no rope_type; {FORM}")
    name = own_type if name is None else _OLD_NAMES.get(name, name)
    if name != "default" and name not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        raise InvalidInputError(f"rope_type {quote(name)} is unknown; use one of {known}")
    if name == own_type:
        merged = own | settings
    else:
        merged = {key: own[key] for key in _MODEL_OWN if key in own} | settings
        _need_original(merged, own, name)
    merged["rope_type"] = name
    missing = [key for key in _NEEDED.get(name, ()) if merged.get(key) is None]
    if missing:
        raise InvalidInputError(f"rope_scaling of type {name} lacks {missing[0]}; give it")
    check_numbers(merged)
    if name in _HAS_ORIGINAL or (per_layer_type and name in ("linear", "dynamic")):
        original = getattr(config, "original_max_position_embeddings", None)
        merged.setdefault(
            "original_max_position_embeddings", original or config.max_position_embeddings
        )
    return merged


def _need_original(merged: dict[str, Any], own: dict[str, Any], name: str) -> None:
    """Refuse to guess the length that a model with a scaling of its own was trained on."""
    own_type = type_of(own)
    is_replaced = own_type != "default" and name != "default"
    if is_replaced and merged.get("original_max_position_embeddings") is None:
        raise InvalidInputError(
            f"rope_scaling {name} would replace the scaling that the model was trained with"
            f" ({own_type}, factor {own.get('factor')}); to do so, give all settings with"
            " original_max_position_embeddings"
        )


def _complete(config: Any) -> None:
    """Let transformers fill in and check a config's rotary settings."""
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"rope_scaling does not work with {config.model_type}: {first_line(error)}; {FORM}"
        ) from None
