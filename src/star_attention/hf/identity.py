"""What an encoded context depends on, field by field, so that a saved one is never used with something else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from star_attention.errors import ContextMismatchError

_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "attn_logit_softcapping",
    "rope_parameters",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "no_rope_layers",
    "rms_norm_eps",
    "layer_norm_eps",
    "hidden_act",
    "num_kv_shared_layers",
    "kv_lora_rank",
    "num_experts_per_tok",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
)
_SAMPLES = 16
"""Elements looked at in each weight: enough to tell any two trainings apart, few enough to cost nothing."""


def model_identity(model: Any, outer: Any) -> dict[str, Any]:
    """Architecture, weights (sampled), precision and active adapters of a model; plain JSON values."""
    # (Not by attribute: configs whose layers differ refuse to name one value for all of them.)
    config = model.config.get_text_config(decoder=True).to_dict()
    return {
        "config": {name: _plain(config.get(name)) for name in _CONFIG_FIELDS},
        "dtype": str(model.dtype),
        "adapters": adapters(outer),
        "weights": _weights(model),
    }


def adapters(model: Any) -> list[str]:
    """Names of the active PEFT adapters."""
    active = getattr(model, "active_adapters", None)
    if not hasattr(model, "peft_config") or active is None:
        return []
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        return []  # inside `with model.disable_adapter()`
    names = active() if callable(active) else active
    return [names] if isinstance(names, str) else sorted(names)


def tokenizer_identity(tokenizer: Any) -> str | None:
    """SHA-256 over a tokenizer's vocabulary, or None for none."""
    if tokenizer is None:
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first field of `ours` that differs, with both values in short; None where nothing does.

    A field that holds fields is compared one by one (`config.vocab_size`).
    """
    for field, value in ours.items():
        other = theirs.get(field)
        pairs = [(field, other, value)]
        if isinstance(value, dict) and isinstance(other, dict):
            pairs = [(f"{field}.{name}", other.get(name), value[name]) for name in value]
        for name, one, mine in pairs:
            if one == mine or (name == "tokenizer" and None in (one, mine)):  # token ids alone need no tokenizer
                continue
            short = [text if len(text := str(value)) <= 40 else text[:12] + "..." for value in (one, mine)]
            return name, short[0], short[1]
    return None


def check(file: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises `ContextMismatchError` naming the first field that differs."""
    found = difference(theirs, ours)
    if found is not None:
        field, other, mine = found
        raise ContextMismatchError(
            field,
            f"{file} does not fit: its {field} is {other}, this model's is {mine};"
            " load the model that encoded it, or encode the context again",
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a few elements of every parameter (of the adapters' too)."""
    digest, samples = hashlib.sha256(), []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        sample = _sample(parameter.detach())
        if sample is not None:
            samples.append(sample)
    # One transfer for all of them.
    for device in sorted({s.device for s in samples}, key=str):
        values = torch.cat([s for s in samples if s.device == device]).cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _sample(weight: Tensor) -> Tensor | None:
    try:
        flat = weight.reshape(-1)
        step = max(1, flat.shape[0] // _SAMPLES)
        return flat[::step][:_SAMPLES].float()
    except (RuntimeError, NotImplementedError):  # quantized tensors that cannot be sliced: name and shape must do
        return None
