"""What an encoded context depends on, field by field, so that a saved one is never used with something else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from star_attention.errors import ContextMismatchError

_NOT_COMPUTED_WITH = {
    *(
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
    ),
    *(
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "id2label",
    ),
    *(
        "label2id",
        "problem_type",
        "task_specific_params",
        "initializer_range",
        "chunk_size_feed_forward",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "is_encoder_decoder",
        "experts_implementation",
    ),
}
"""Fields of a config that no key or value depends on; every other one is compared."""
_SAMPLES = 16
"""Elements looked at in each weight: enough to tell any two trainings apart, few enough to cost nothing."""


def model_identity(model: Any, outer: Any) -> dict[str, Any]:
    """Architecture, weights (sampled), precision and active adapters of a model; plain JSON values."""
    # (Not by attribute: configs whose layers differ refuse to name one value for all of them.)
    config = model.config.get_text_config(decoder=True).to_dict()
    config = {
        "model_type": config.get("model_type")
    } | config  # what is told first where two models differ
    return {
        "config": {
            name: _plain(value)
            for name, value in config.items()
            if name not in _NOT_COMPUTED_WITH
            and "dropout" not in name
            and not name.startswith("_attn")
        },
        "dtype": str(model.dtype),
        "adapters": adapters(outer),
        "weights": _weights(model),
    }


def adapters(model: Any) -> list[str]:
    """Names and scales of the active PEFT adapters."""
    active = getattr(model, "active_adapters", None)
    if not hasattr(model, "peft_config") or active is None:
        return []
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        return []  # inside `with model.disable_adapter()`
    names = active() if callable(active) else active
    return [
        _with_scale(model, name) for name in ([names] if isinstance(names, str) else sorted(names))
    ]


def _with_scale(model: nn.Module, name: str) -> str:
    """`name`, with the scales of its layers where there are any: they are no weights, but they count."""
    scales = {
        scaling[name]
        for module in model.modules()
        if isinstance(scaling := getattr(module, "scaling", None), dict) and name in scaling
    }
    return " ".join([name, *(f"x{scale:g}" for scale in sorted(scales))])


def state(outer: nn.Module) -> tuple[Any, ...]:
    """Changes whenever weights or adapters of a loaded model do; costs no look at the weights."""
    held = []
    for tensor in (*outer.parameters(), *outer.buffers()):
        held.append((id(tensor), 0 if tensor.is_inference() else tensor._version))
    return (*adapters(outer), hash(tuple(held)))


def tokenizer_identity(tokenizer: Any) -> str | None:
    """SHA-256 over all that a tokenizer does (for slow ones: its vocabulary), or None for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # How the last call padded and truncated is no property of the tokenizer.
        text = json.dumps(
            {key: rule for key, rule in rules.items() if key not in ("padding", "truncation")},
            sort_keys=True,
        )
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


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
            if one == mine or (
                name == "tokenizer" and None in (one, mine)
            ):  # token ids alone need no tokenizer
                continue
            short = [
                text if len(text := str(value)) <= 40 else text[:12] + "..."
                for value in (one, mine)
            ]
            return name, short[0], short[1]
    return None


def check(file: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises `ContextMismatchError` naming the first field that differs."""
    found = difference(theirs, ours)
    if found is not None:
        field, other, mine = found
        remedy = "load the model that encoded it"
        if field == "dtype":
            remedy = f"load the model in {other.removeprefix('torch.')} (dtype=, or --dtype)"
        raise ContextMismatchError(
            field,
            f"{file} does not fit: its {field} is {other}, this model's is {mine};"
            f" {remedy}, or encode the context again",
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a few elements of every parameter and buffer (of the adapters' too)."""
    digest, samples = hashlib.sha256(), []
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        if "inv_freq" in name:  # follows from the config, and some models change it as they run
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        samples.append(_sample(tensor.detach()))
    # One transfer for each device; in the order of names, wherever the weights lie.
    on_cpu: dict[int, Tensor] = {}
    for device in {sample.device for sample in samples}:
        here = [index for index, sample in enumerate(samples) if sample.device == device]
        values = (
            torch.cat([samples[index] for index in here])
            .cpu()
            .split([samples[index].numel() for index in here])
        )
        on_cpu |= dict(zip(here, values, strict=True))
    digest.update(torch.cat([on_cpu[index] for index in range(len(samples))]).numpy().tobytes())
    return digest.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    if weight.device.type == "meta":  # offloaded: name and shape must do
        return torch.empty(0)
    try:
        if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
            weight = weight.dequantize()
        flat = weight.reshape(-1)
        step = max(1, flat.shape[0] // _SAMPLES)
        return flat[::step][:_SAMPLES].float()
    except (
        RuntimeError,
        NotImplementedError,
    ):  # a quantized tensor that cannot be read: name and shape must do
        return torch.empty(0, device=weight.device)
