"""Which models can run, and why others cannot."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LAYER_REASONS = {
    "linear_attention": "linear-attention layers keep a running state instead of keys and values",
    "chunked_attention": "chunked-attention layers cut the context by themselves",
}
# Settings that make an attention of another kind, with the words for it.
_CONFIG_REASONS = {
    "attention_chunk_size": "chunked-attention layers cut the context by themselves",
    "index_topk": "its attention picks keys by an indexer of its own",
    "alibi": "it biases scores by distance (ALiBi), which the attention interface does not carry",
    "keep_window_size": "it writes a bias for each key, computed from the values, into the mask",
}


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper (whose layers it holds), or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if base is not None and hasattr(model, "peft_config") else model


def reasons(model_or_config: Any) -> list[str]:
    """Why a model, or the model of a config, cannot run; empty when it can."""
    if isinstance(model_or_config, PretrainedConfig):
        return _config_reasons(model_or_config) + _class_reasons(
            _class_of(model_or_config), model_or_config
        )
    why = []
    model = unwrap(model_or_config)
    if model is not model_or_config:
        for adapter in model_or_config.peft_config.values():
            if getattr(adapter, "is_prompt_learning", False):
                why.append(
                    f"{adapter.peft_type} adapters put virtual tokens in front of every forward;"
                    " adapters inside the layers (LoRA) work"
                )
    if isinstance(model, (str, os.PathLike)):
        return [f"{str(model)!r} is a path, not a model; load it with StarLLM.from_pretrained"]
    if not isinstance(model, PreTrainedModel):
        return [*why, f"{type(model).__name__} is not a transformers model"]
    return why + _config_reasons(model.config) + _class_reasons(type(model), model.config)


def _class_of(config: PretrainedConfig) -> Any:
    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return None
    return kind[0] if isinstance(kind, (tuple, list)) else kind


def _class_reasons(kind: Any, config: PretrainedConfig) -> list[str]:
    if kind is None:
        return [
            f"{config.model_type or type(config).__name__} has no causal language model in transformers"
        ]
    why = []
    if not callable(getattr(kind, "generate", None)):
        why.append(f"{kind.__name__} does not generate text")
    if getattr(kind, "_is_stateful", False):
        why.append("it keeps a running state instead of keys and values of all tokens")
    elif not hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS"):
        # (The class flag `_supports_attention_backend` is missing from families that do use the interface.)
        why.append(
            f"{kind.__name__}'s attention does not go through transformers' attention interface"
        )
    return why


def _config_reasons(config: PretrainedConfig) -> list[str]:
    if getattr(config, "is_encoder_decoder", False):
        return ["it is an encoder-decoder model; Star Attention is for decoder-only models"]
    text: Any = config.get_text_config(decoder=True)
    why = []
    for kind in sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES):
        why.append(
            _LAYER_REASONS.get(
                kind,
                f"it has {kind} layers; only full and sliding-window attention can be cut into blocks",
            )
        )
    for name, reason in _CONFIG_REASONS.items():
        if getattr(text, name, None) and reason not in why:
            why.append(reason)
    if getattr(text, "is_causal", True) is False or getattr(
        text, "use_bidirectional_attention", None
    ) in (True, "all"):
        why.append("it attends in both directions")
    elif getattr(text, "is_decoder", True) is False and not str(text.model_type).startswith(
        "gpt_neox"
    ):
        # (GPT-NeoX has the setting too, says False, and is a decoder all the same.)
        why.append("it attends in both directions, as its config says is_decoder=False")
    if not getattr(text, "num_hidden_layers", None):
        why.append("its config does not say how many layers it has")
    return why
