"""The `ModelShape` of the most frequent families, from config.json alone.

`hf/shape.py` asks the model itself, whatever its family; importing it takes seconds. Here families
whose layers are all alike are counted by hand, and only if every field of the file is known: any
other config is left to the model. Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from star_attention.errors import InvalidInputError, UnsupportedModelError, quote
from star_attention.planning.model_shape import (
    FP8_ENDS,
    FP8_STEP,
    AttentionShape,
    ModelShape,
)

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LIKE_TORCHS = re.compile("[bcq]?u?(int|float|double|half|bool|bits?|complex|long|short)[0-9a-z_]*")
"""Names that torch may have as a dtype."""

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a family's layers have beside the projections of attention and the MLP.

    Attributes:
        needs: fields whose defaults are the family's own, so that the file must have them.
        is_tied: default of tie_word_embeddings.
        norms: normalizations of a hidden state in each layer.
        has_head_norms: True if queries and keys are normalized by head.
        has_biases: True if queries, keys and values have a bias.
        has_windows: True if layers have windows, in `layer_types` or else all of them.
        expert_width: field with the width of an expert; None for a plain MLP.
    """

    needs: tuple[str, ...] = ()
    is_tied: bool = False
    norms: int = 2
    has_head_norms: bool = False
    has_biases: bool = False
    has_windows: bool = False
    expert_width: str | None = None


_FAMILIES = {
    "gemma": _Family(needs=("head_dim",), is_tied=True),
    "gemma2": _Family(
        needs=("head_dim", "sliding_window", "layer_types"), is_tied=True, norms=4, has_windows=True
    ),
    "gemma3_text": _Family(
        needs=("head_dim", "sliding_window", "layer_types"),
        is_tied=True,
        norms=4,
        has_head_norms=True,
        has_windows=True,
    ),
    "granite": _Family(),
    "llama": _Family(),
    "mistral": _Family(needs=("sliding_window",), has_windows=True),
    "mixtral": _Family(expert_width="intermediate_size"),
    "qwen2": _Family(has_biases=True),
    "qwen3": _Family(needs=("head_dim",), has_head_norms=True),
    "qwen3_moe": _Family(
        needs=("head_dim",), has_head_norms=True, expert_width="moe_intermediate_size"
    ),
}

SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
"""Fields that every one of these configs has."""


def read(config: dict[str, Any], dtype: str) -> tuple[ModelShape, Any] | None:
    """Return the shape of a config's model, and what `positions` reads of its config.

    Args:
        config: the contents of config.json.
        dtype: as for `hf.shape.model_shape`.

    Returns:
        None if that takes transformers: another family, or a field that is not known here.
    """
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or not all(_is_known(name, config) for name in config):
        return None
    needed = [*SIZES, *family.needs]
    if family.expert_width is not None:
        needed += ["num_experts_per_tok", family.expert_width]
    if any(name not in config for name in needed) or not _fits(family, config):
        return None
    stated = config.get("dtype") or config.get("torch_dtype") or "float32"
    size = _DTYPE_BYTES.get(str(stated if dtype == "auto" else dtype))
    rotary = config.get("rope_parameters") or config.get("rope_scaling")
    if size is None:
        return None
    text_config = SimpleNamespace(
        model_type=config["model_type"],
        max_position_embeddings=config["max_position_embeddings"],
        rope_parameters=rotary,
    )
    return _shape(family, config, size), text_config


def check_dtype(dtype: str) -> None:
    """Refuse what cannot be the name of a dtype. Whether torch has it, `hf/shape.py` asks.

    Raises:
        InvalidInputError: it is none.
    """
    if dtype != "auto" and not _LIKE_TORCHS.fullmatch(dtype):
        raise unknown_dtype(dtype)


def unknown_dtype(dtype: str) -> InvalidInputError:
    """Return the error for a dtype that torch does not have."""
    return InvalidInputError(
        f"dtype {quote(dtype)} is unknown; use auto, float32, bfloat16 or float16"
    )


def reasons_against_shards(config: dict[str, Any], tensor_parallel: int) -> list[str]:
    """Return what `tensor_parallel.reasons` does, for a config that `read` takes."""
    return [
        indivisible(name, config[name], tensor_parallel)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        if config[name] % tensor_parallel
    ]


def cannot_shard(family: str, tensor_parallel: int, reasons: list[str]) -> UnsupportedModelError:
    """Return the error for a model that cannot be sharded."""
    return UnsupportedModelError(f"{family} with tensor_parallel {tensor_parallel}", reasons)


def indivisible(name: str, size: int, tensor_parallel: int) -> str:
    """Return the reason against shards of a size that a number of ranks does not divide."""
    return f"its {name} {size} does not divide by tensor_parallel {tensor_parallel}"


# ---------------------------------------------------------------------------------------- counting


def _shape(family: _Family, config: dict[str, Any], element_bytes: int) -> ModelShape:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or hidden // heads
    projections = 2 * hidden * head_size * (heads + kv_heads)
    biases = head_size * (heads + 2 * kv_heads) if family.has_biases else 0
    norms = family.norms * hidden + (2 * head_size if family.has_head_norms else 0)
    if family.expert_width is None:
        mlp = active = 3 * hidden * config["intermediate_size"]
        router = 0
    else:
        experts, expert = _experts(config), 3 * hidden * config[family.expert_width]
        mlp, active = expert * experts, expert * config["num_experts_per_tok"]
        router = hidden * experts
    quantizable = _quantizable(family, config, heads * head_size, kv_heads * head_size)
    inner = max(0, layers - 2 * FP8_ENDS)
    embedding = config["vocab_size"] * hidden
    is_tied = config.get("tie_word_embeddings", family.is_tied)
    layer = projections + biases + norms + mlp + router
    return ModelShape(
        name=config["model_type"],
        layers=layers,
        hidden_size=hidden,
        attention=tuple(
            AttentionShape(
                heads=heads,
                kv_heads=kv_heads,
                k_head_size=head_size,
                v_head_size=head_size,
                window=window,
            )
            for window in _windows(family, config)
        ),
        kv_elements_by_layer=(2 * kv_heads * head_size,) * layers,
        kv_scales_per_token=2 * kv_heads * layers,
        linear_parameters=layers * (projections + active + router),
        sharded_parameters=layers * (projections + biases + mlp),
        # The outputs of attention and of the MLP.
        all_reduced_elements_per_token=2 * layers * hidden,
        all_reduces=2 * layers,
        head_parameters=embedding,
        parameters=embedding * (1 if is_tied else 2) + layers * layer + hidden,
        bytes_per_element=element_bytes,
        quantizable_parameters=inner * sum(rows * columns for rows, columns in quantizable),
        quantizable_rows=inner * sum(rows for rows, _ in quantizable),
    )


def _quantizable(
    family: _Family, config: dict[str, Any], q_size: int, kv_size: int
) -> list[tuple[int, int]]:
    """Return the sizes of an inner layer's matrices that `hf.loading.fp8` quantizes.

    Experts are tensors of their own kind.
    """
    hidden, width = config["hidden_size"], config["intermediate_size"]
    sizes = [(q_size, hidden), (kv_size, hidden), (kv_size, hidden), (hidden, q_size)]
    if family.expert_width is None:
        sizes += [(width, hidden), (width, hidden), (hidden, width)]
    return [size for size in sizes if not any(each % FP8_STEP for each in size)]


def _experts(config: dict[str, Any]) -> int:
    """Return the number of experts, whose field has two names; 0 without one."""
    number: int = config.get("num_local_experts") or config.get("num_experts") or 0
    return number


def _windows(family: _Family, config: dict[str, Any]) -> list[int | None]:
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not family.has_windows:
        return [None] * layers
    types = config.get("layer_types") or [_SLIDING] * layers
    return [window if kind == _SLIDING else None for kind in types]


# ------------------------------------------------------------------------------------------ fields


def _fits(family: _Family, config: dict[str, Any]) -> bool:
    """True if sizes fit each other."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    types = config.get("layer_types")
    return (
        hidden % heads == 0
        and heads % config["num_key_value_heads"] == 0
        and (types is None or len(types) == config["num_hidden_layers"])
        and (family.expert_width is None or config["num_experts_per_tok"] <= _experts(config))
    )


def _is_known(name: str, config: dict[str, Any]) -> bool:
    """True if a field is known, and its value changes nothing that is not counted here."""
    is_fine = _FIELDS.get(name)
    return is_fine is not None and is_fine(config[name], config)


def _is_count(value: Any, _: dict[str, Any]) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any, _: dict[str, Any]) -> bool:
    return type(value) in (int, float)


def _is_float(value: Any, _: dict[str, Any]) -> bool:
    return type(value) is float


def _is_flag(value: Any, _: dict[str, Any]) -> bool:
    return isinstance(value, bool)


def _is_off(value: Any, _: dict[str, Any]) -> bool:
    return value is False


def _is_text(value: Any, _: dict[str, Any]) -> bool:
    return isinstance(value, str)


def _is_activation(value: Any, _: dict[str, Any]) -> bool:
    return value in ("silu", "gelu_pytorch_tanh", "gelu")


def _is_empty(value: Any, _: dict[str, Any]) -> bool:
    return value in (None, [])


def _or_none(
    is_fine: Callable[[Any, dict[str, Any]], bool],
) -> Callable[[Any, dict[str, Any]], bool]:
    return lambda value, config: value is None or is_fine(value, config)


def _is_token(value: Any, config: dict[str, Any]) -> bool:
    """transformers logs a message about tokens that are not of the vocabulary."""
    size = config.get("vocab_size")
    ids = value if isinstance(value, list) else [value]
    return type(size) is int and all(type(token) is int and 0 <= token < size for token in ids)


def _is_window(value: Any, config: dict[str, Any]) -> bool:
    if config["model_type"] in ("mixtral", "qwen3_moe"):
        return value is None
    return _is_count(value, config)


def _are_layer_types(value: Any, config: dict[str, Any]) -> bool:
    kinds = (_SLIDING, _FULL) if _FAMILIES[config["model_type"]].has_windows else (_FULL,)
    return isinstance(value, list) and all(kind in kinds for kind in value)


def _are_names(value: Any, _: dict[str, Any]) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_rotary(value: Any, config: dict[str, Any]) -> bool:
    """True for rotary settings of a kind that transformers takes without a word."""
    if not isinstance(value, dict):
        return False
    if config["model_type"] == "gemma3_text" and set(value) == {_SLIDING, _FULL}:
        return all(isinstance(each, dict) and _is_rotary_kind(each) for each in value.values())
    return _is_rotary_kind(value)


def _is_rotary_kind(settings: dict[str, Any]) -> bool:
    kind = settings.get("rope_type", settings.get("type", "default"))
    names = _ROTARY.get(kind) if isinstance(kind, str) else None
    own = settings.keys() - {"rope_type", "type", "rope_theta"}
    if names is None or own != names or not _is_number(settings.get("rope_theta", 1.0), {}):
        return False
    if not all(_is_number(settings[name], {}) for name in names):
        return False
    low, high = (settings.get(f"{name}_freq_factor", at) for name, at in (("low", 0), ("high", 1)))
    return bool(settings.get("factor", 1) >= 1 and low < high)


_ROTARY: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}
"""Settings of each type beside `rope_theta`."""

_FIELDS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    **dict.fromkeys((*SIZES, "pretraining_tp", "max_window_layers"), _is_count),
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        _is_count,
    ),
    **dict.fromkeys(
        (
            "initializer_range",
            "attention_dropout",
            "rope_theta",
            "rope_local_base_freq",
            "query_pre_attn_scalar",
            "embedding_multiplier",
            "logits_scaling",
            "residual_multiplier",
            "attention_multiplier",
            "router_aux_loss_coef",
            "router_jitter_noise",
        ),
        _is_number,
    ),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _or_none(_is_number)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _or_none(_is_token)),
    **dict.fromkeys(
        ("use_cache", "tie_word_embeddings", "norm_topk_prob", "output_router_logits"), _is_flag
    ),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "is_encoder_decoder", "use_sliding_window"), _is_off
    ),
    **dict.fromkeys(("transformers_version", "_name_or_path", "model_type"), _is_text),
    **dict.fromkeys(("dtype", "torch_dtype"), _or_none(_is_text)),
    **dict.fromkeys(("hidden_act", "hidden_activation"), _is_activation),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _or_none(_is_rotary)),
    "architectures": _or_none(_are_names),
    "decoder_sparse_step": lambda value, _: value == 1,
    "head_dim": _is_count,
    "layer_types": _or_none(_are_layer_types),
    "mlp_only_layers": _is_empty,
    "rms_norm_eps": _is_float,
    "_sliding_window_pattern": _is_count,
    "sliding_window": _or_none(_is_window),
    "use_bidirectional_attention": lambda value, _: value in (None, False),
}
"""Every field that is known, with a test of its value."""
