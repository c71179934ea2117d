"""How many positions a model has, as configs of its family mean it. Imports no torch.

Rotary settings are those of `rope_parameters`, which configs of before called `rope_scaling`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from star_attention.planning.positions import Doubt


def type_of(parameters: dict[str, Any]) -> str:
    """Return the rope type of rotary settings, which old configs call `type`."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def is_per_layer_type(parameters: dict[str, Any]) -> bool:
    """Return True if rotary settings differ by layer type."""
    return any(isinstance(value, dict) for value in parameters.values())


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary settings of a text config, one entry per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if is_per_layer_type(parameters):
        return [value for value in parameters.values() if isinstance(value, dict)]
    return [parameters]


def max_positions(config: Any) -> int | None:
    """Return the number of positions that a model has; None if the config sets no limit.

    Families state the length before or after scaling, so each type is read as its configs mean it.
    """
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int):
        return None
    if str(getattr(config, "model_type", "")).startswith("cohere"):
        # Command R states the length of its first training here, and its real one there.
        stated = max(stated, getattr(config, "model_max_length", None) or 0)
    per_layer_type = is_per_layer_type(getattr(config, "rope_parameters", None) or {})
    return max(
        stated,
        *(_stretched(each, stated, per_layer_type) for each in rope_parameters(config)),
    )


def _stretched(parameters: dict[str, Any], stated: int, per_layer_type: bool) -> int:
    """Return the positions that scaled frequencies are meant for."""
    factor = parameters.get("factor")
    original = parameters.get("original_max_position_embeddings")
    match type_of(parameters):
        case "default":
            return stated
        case "yarn" | "dynamic":
            # Dynamic NTK begins where the stated length ends.
            original = original or stated
        case "linear":
            # transformers' convention is that the config keeps its original length. Configs with
            # settings per layer type (Gemma 3) state the final one.
            original = original or (None if per_layer_type else stated)
        case _:
            # Their factor shapes the frequencies: Llama 3.2 has 32 x 8,192, and 131,072 positions.
            original = original if original == stated else None
    return int(original * factor) if original and factor else stated


def doubt(config: Any) -> Doubt | None:
    """Return the doubt about a text config's limit, None if its settings leave none."""
    chunked = getattr(config, "dual_chunk_attention_config", None)
    if isinstance(chunked, dict):
        # Qwen2.5-1M. The field is not one of transformers'.
        length = chunked.get("original_max_position_embeddings") or chunked.get("chunk_size")
        if isinstance(length, int):
            reason = "its config asks for dual chunk attention beyond, which transformers lacks"
            return Doubt(length=length, reason=reason)
    own = getattr(config, "rope_parameters", None) or {}
    stated = getattr(config, "max_position_embeddings", None)
    factor = own.get("factor")
    if type_of(own) != "linear" or not isinstance(stated, int) or not factor or factor <= 1:
        return None
    final = int(stated * factor)
    if own.get("original_max_position_embeddings") or final in _other_lengths(config):
        return None
    return Doubt(
        length=stated,
        reason=f"its config states {stated:,} positions beside linear scaling by {factor:g}, but"
        " not whether before or after it",
    )


def _other_lengths(config: Any) -> list[Any]:
    """Return lengths in fields that transformers does not read, but that authors write."""
    names = ("max_sequence_length", "model_max_length", "seq_length", "max_seq_len")
    return [getattr(config, name, None) for name in names]


def most_positions(config: dict[str, Any]) -> int | None:
    """Return a number of positions that a model has at most, by the contents of its config.json.

    The model may have fewer: a file leaves out what its family fills in. None if it does not say.
    """
    text = config.get("text_config")
    fields = text if isinstance(text, dict) else config
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling")
    if parameters is not None and not isinstance(parameters, dict):
        return None
    try:
        return max_positions(SimpleNamespace(**fields | {"rope_parameters": parameters}))
    except (TypeError, ValueError):
        # transformers words what is wrong with a config.
        return None
