"""Identity of a model and tokenizer: what a context depends on, compared before it is used."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from star_attention.errors import ContextMismatchError

_IRRELEVANT_FIELDS = {
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of a config that no key or value depends on; all others are compared."""

_SAMPLES = 16
"""Elements sampled from each weight: enough to tell two trainings apart, at almost no cost."""


def model_identity(model: Any, outer: Any) -> dict[str, Any]:
    """Return a model's architecture, sampled weights, precision and active adapters.

    Args:
        model: the transformers model.
        outer: the PEFT model around it, or `model` itself.

    Returns:
        JSON values by field.
    """
    # As a dict, because configs whose layers differ refuse to give one value for all of them.
    config = model.config.get_text_config(decoder=True).to_dict()
    # First, so that it is the field reported for two different architectures.
    config = {"model_type": config.get("model_type")} | config
    return {
        "config": {
            name: _as_json(value)
            for name, value in config.items()
            if name not in _IRRELEVANT_FIELDS
            and "dropout" not in name
            and not name.startswith("_attn")
        },
        "dtype": str(model.dtype),
        "adapters": adapters(outer),
        "weights": _weights_checksum(model),
    }


def adapters(model: Any) -> list[str]:
    """Return the names and scales of the active PEFT adapters."""
    active = getattr(model, "active_adapters", None)
    if not hasattr(model, "peft_config") or active is None:
        return []
    # Inside `with model.disable_adapter()` none is active.
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        return []
    names = active() if callable(active) else active
    names = [names] if isinstance(names, str) else sorted(names)
    return [_with_scales(model, name) for name in names]


def _with_scales(model: nn.Module, name: str) -> str:
    """Return an adapter's name and the scales of its layers, which the weights do not include."""
    scales = {
        scaling[name]
        for module in model.modules()
        if isinstance(scaling := getattr(module, "scaling", None), dict) and name in scaling
    }
    return " ".join([name, *(f"x{scale:g}" for scale in sorted(scales))])


def state(outer: nn.Module) -> tuple[Any, ...]:
    """Return a value that changes whenever weights or adapters of a model do; reads no weights."""
    versions = tuple(
        (id(tensor), 0 if tensor.is_inference() else tensor._version)
        for tensor in (*outer.parameters(), *outer.buffers())
    )
    return (*adapters(outer), hash(versions))


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Return the SHA-256 of a tokenizer's rules (a slow one's vocabulary), or None without one."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        rules = json.loads(backend.to_str())
        # These two only record how the last call padded and truncated.
        rules = {key: rule for key, rule in rules.items() if key not in ("padding", "truncation")}
        text = json.dumps(rules, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(actual: dict[str, Any], expected: dict[str, Any]) -> tuple[str, str, str] | None:
    """Find the first field of `expected` that differs in `actual`.

    Fields that contain fields are compared one by one (`config.vocab_size`). A missing tokenizer
    matches every tokenizer, because token ids need none.

    Returns:
        The field, and both values shortened, `actual`'s first; None if nothing differs.
    """
    for field, value in expected.items():
        pairs = [(field, actual.get(field), value)]
        if isinstance(value, dict) and isinstance(actual.get(field), dict):
            pairs = [(f"{field}.{name}", actual[field].get(name), value[name]) for name in value]
        for name, *values in pairs:
            if values[0] != values[1] and not (name == "tokenizer" and None in values):
                return name, _shortened(values[0]), _shortened(values[1])
    return None


def check(name: str, context: dict[str, Any], model: dict[str, Any]) -> None:
    """Check that a context was encoded with this model and tokenizer.

    Args:
        name: what to call the context in an error.
        context: the context's identity.
        model: this model's identity.

    Raises:
        ContextMismatchError: names the first field that differs.
    """
    mismatch = difference(context, model)
    if mismatch is None:
        return
    field, context_value, model_value = mismatch
    remedy = "load the model that encoded it"
    if field == "config.rope_parameters":
        remedy = (
            "load the model with the same rotary scaling"
            ' (model_kwargs={"rope_scaling": ...}, or --rope-scaling)'
        )
    if field == "dtype":
        remedy = f"load the model in {context_value.removeprefix('torch.')} (dtype=, or --dtype)"
    raise ContextMismatchError(
        field,
        f"{name} does not fit: it differs in {field}: {context_value} in the context,"
        f" {model_value} in this model; {remedy}, or encode the context again",
    )


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _weights_checksum(model: nn.Module) -> str:
    """Return the SHA-256 of names, shapes and samples of all parameters and buffers."""
    digest, samples = hashlib.sha256(), []
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        # It follows from the config, and some models change it while they run.
        if "inv_freq" in name:
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        samples.append(_sample(tensor.detach()))
    digest.update(torch.cat(_to_cpu(samples)).numpy().tobytes())
    return digest.hexdigest()


def _to_cpu(samples: list[Tensor]) -> list[Tensor]:
    """Copy small tensors to the CPU in one transfer per device, keeping their order."""
    on_cpu: dict[int, Tensor] = {}
    for device in {sample.device for sample in samples}:
        indices = [index for index, sample in enumerate(samples) if sample.device == device]
        joined = torch.cat([samples[index] for index in indices]).cpu()
        parts = joined.split([samples[index].numel() for index in indices])
        on_cpu |= dict(zip(indices, parts, strict=True))
    return [on_cpu[index] for index in range(len(samples))]


def _sample(weight: Tensor) -> Tensor:
    # Offloaded weights, and quantized ones that cannot be read, are identified by name and shape.
    if weight.device.type == "meta":
        return torch.empty(0)
    try:
        if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
            weight = weight.dequantize()
        flat = weight.reshape(-1)
        step = max(1, flat.shape[0] // _SAMPLES)
        return flat[::step][:_SAMPLES].float()
    except (RuntimeError, NotImplementedError):
        return torch.empty(0, device=weight.device)
