"""Reasons against a model's family, from config.json and the source of transformers alone.

`support` asks the classes themselves, and has the last word; but importing them takes seconds, and
most families that cannot run say so in plain text.
"""

from __future__ import annotations

import re
from typing import Any

from star_attention.hf.loading.config_file import family_file

RUNNING_STATE = "it keeps a running state instead of keys and values of all tokens"
ENCODER_DECODER = "it is an encoder-decoder model; Star Attention runs decoder-only models"

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LAYER_REASONS = {
    "linear_attention": "linear-attention layers keep a running state instead of keys and values",
    "chunked_attention": "chunked-attention layers cut the context into chunks of their own",
}
_FIELD_REASONS = {
    "attention_chunk_size": "chunked-attention layers cut the context into chunks of their own",
    "index_topk": "its attention selects keys with an indexer of its own",
    "alibi": "it biases scores by distance (ALiBi), which the attention interface does not pass on",
    "keep_window_size": "it writes a bias for each key, computed from the values, into the mask",
}
"""Config fields that are set for other kinds of attention, with the reasons."""

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What a family imports if its attention goes through the attention interface."""
_STATEFUL = "    _is_stateful = True\n"
_CAUSAL_LM = re.compile(r"^class (\w+(?:ForCausalLM|LMHeadModel))\(", re.MULTILINE)


def off_interface(name: str) -> str:
    """Return the reason against a class that does not use the attention interface."""
    return f"{name}'s attention does not go through transformers' attention interface"


def field_reasons(text_config: Any) -> list[str]:
    """Return the reasons in the fields of a text config, an object or a dict."""

    def get(name: str) -> Any:
        if isinstance(text_config, dict):
            return text_config.get(name)
        return getattr(text_config, name, None)

    problems = []
    types = get("layer_types")
    kinds = {str(kind) for kind in types} if isinstance(types, (list, tuple)) else set()
    for kind in sorted(kinds - _LAYER_TYPES):
        default = f"it has {kind} layers; only full and sliding-window attention works in blocks"
        problems.append(_LAYER_REASONS.get(kind, default))
    for name, reason in _FIELD_REASONS.items():
        if get(name) and reason not in problems:
            problems.append(reason)
    if get("is_causal") is False or get("use_bidirectional_attention") in (True, "all"):
        problems.append("it attends in both directions")
    elif get("is_decoder") is False and not str(get("model_type")).startswith("gpt_neox"):
        # GPT-NeoX is a decoder, although it sets the field to False.
        problems.append("it attends in both directions, as its config says is_decoder=False")
    return problems


def reasons(config: dict[str, Any]) -> list[str]:
    """Return reasons why the model of a config.json cannot run, as far as text tells.

    Args:
        config: the contents of config.json.
    """
    if "auto_map" in config:
        return []
    if config.get("is_encoder_decoder") is True:
        return [ENCODER_DECODER]
    text = config.get("text_config")
    parts = [text, config] if isinstance(text, dict) else [config]
    source = next(
        filter(None, (family_file(part.get("model_type"), "modeling") for part in parts)), ""
    )
    problems, classes = field_reasons(parts[0]), _CAUSAL_LM.findall(source)
    if _STATEFUL in source:
        problems.append(RUNNING_STATE)
    elif classes and INTERFACE not in source:
        problems.append(off_interface(classes[0]))
    return problems
