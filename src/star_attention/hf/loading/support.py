"""The reasons why Star Attention cannot run a model."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from star_attention.errors import quote
from star_attention.hf.loading import rope
from star_attention.hf.loading.checks import virtual_tokens
from star_attention.hf.loading.family_source import (
    ENCODER_DECODER,
    INTERFACE,
    RUNNING_STATE,
    field_reasons,
    off_interface,
)


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if base is not None and hasattr(model, "peft_config") else model


def reasons(model_or_config: Any) -> list[str]:
    """Return the reasons why a model, or the model of a config, cannot run; empty if it can."""
    if isinstance(model_or_config, PretrainedConfig):
        return _config_reasons(model_or_config) + _class_reasons(
            class_of(model_or_config), model_or_config
        )
    problems = []
    model = unwrap(model_or_config)
    if model is not model_or_config:
        for adapter in model_or_config.peft_config.values():
            if getattr(adapter, "is_prompt_learning", False):
                problems.append(virtual_tokens(adapter.peft_type))
    if isinstance(model, (str, os.PathLike)):
        return [f"{quote(str(model))} is a path, not a model; load it with StarLLM.from_pretrained"]
    if not isinstance(model, PreTrainedModel):
        return [*problems, f"{type(model).__name__} is not a transformers model"]
    return problems + _config_reasons(model.config) + _class_reasons(type(model), model.config)


def class_of(config: PretrainedConfig) -> Any:
    """Return the causal language model's class of a config; None if there is none."""
    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return _class_of_own_code(config)
    return kind[0] if isinstance(kind, (tuple, list)) else kind


def _class_of_own_code(config: PretrainedConfig) -> Any:
    """Return the class that a model's own code defines.

    A config's class has been made of that code only if the user allowed to run it.
    """
    name = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if name is None or not type(config).__module__.startswith("transformers_modules"):
        return None
    return get_class_from_dynamic_module(name, config.name_or_path)


def _class_reasons(kind: Any, config: PretrainedConfig) -> list[str]:
    if kind is None:
        return [
            f"{config.model_type or type(config).__name__} has no causal language model in"
            " transformers"
        ]
    problems = []
    if not callable(getattr(kind, "generate", None)):
        problems.append(f"{kind.__name__} does not generate text")
    if getattr(kind, "_is_stateful", False):
        problems.append(RUNNING_STATE)
    elif not any(
        hasattr(sys.modules.get(part.__module__), INTERFACE)
        for part in kind.__mro__
        if issubclass(part, PreTrainedModel) and part is not PreTrainedModel
    ):
        # The class flag `_supports_attention_backend` is missing from families that do use the
        # interface. A model's own code may derive from a class of transformers.
        problems.append(off_interface(kind.__name__))
    return problems


def _config_reasons(config: PretrainedConfig) -> list[str]:
    if getattr(config, "is_encoder_decoder", False):
        return [ENCODER_DECODER]
    text: Any = config.get_text_config(decoder=True)
    problems = field_reasons(text)
    problems += rope.unknown_types(text)
    if not getattr(text, "num_hidden_layers", None):
        problems.append("its config does not say how many layers it has")
    return problems
