"""Identity of a model and tokenizer: what a context depends on, compared before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from star_attention.errors import ContextMismatchError
from star_attention.hf.loading import fingerprint, fp8, rope, support
from star_attention.hf.loading.checksum import digests, to_cpu

_AS_CONFIGURED = "as the config says"

_SAMPLES = 16
"""Elements of each weight in the field `weights`, the only check of files of earlier versions."""

_CHECKSUMS: WeakKeyDictionary[nn.Module, dict[str, tuple[tuple[Any, ...], bytes]]] = (
    WeakKeyDictionary()
)
"""For each model and name of a tensor: its signs (`fingerprint.signs`), and its checksum then."""


def model_identity(model: Any, outer: Any, *, fresh: bool = False) -> dict[str, Any]:
    """Return a model's architecture, weights, precision and active adapters.

    Args:
        model: the transformers model.
        outer: the PEFT model around it, or `model` itself.
        fresh: read all weights, even those that show no sign of a change since the last time.

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
            if name not in fingerprint.IRRELEVANT_FIELDS
            and "dropout" not in name
            and not name.startswith("_attn")
        },
        "linear_weights": fp8.precision(model),
        "dtype": str(model.dtype),
        "adapters": adapters(outer),
        "adapter_layers": _digest(_adapter_layers(outer)),
        "weights": _sampled_weights(model),
        "checksum": weights_checksum(model, fresh=fresh),
        "rotary": rope.edited_frequencies(model.get_decoder()) or _AS_CONFIGURED,
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


def _adapter_layers(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return the active adapters of each adapted layer, with their scales.

    Layers can be switched and scaled one by one, which the names of the model's do not show.
    """
    if not hasattr(model, "peft_config"):
        return []
    layers = []
    for module in model.modules():
        is_off = getattr(module, "disable_adapters", None)
        if not isinstance(is_off, bool):
            continue
        names: Iterable[str] = () if is_off else getattr(module, "active_adapters", ())
        scaling = getattr(module, "scaling", None)
        scales = scaling if isinstance(scaling, dict) else {}
        layers.append(tuple((name, scales.get(name)) for name in names))
    return layers


def _digest(layers: list[tuple[Any, ...]]) -> str | None:
    return hashlib.sha256(repr(layers).encode()).hexdigest() if layers else None


def state(outer: nn.Module) -> tuple[Any, ...]:
    """Return a value that changes whenever weights, adapters or config of a model do.

    It reads a few elements of each weight; `fingerprint` says what can go unnoticed.
    """
    text_config = support.unwrap(outer).config.get_text_config(decoder=True)
    return (
        *adapters(outer),
        *_adapter_layers(outer),
        fingerprint.config(text_config),
        fingerprint.weights(outer),
    )


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
    # Files of earlier versions lack these fields.
    unknown = {name: model.get(name) for name in ("checksum", "adapter_layers")}
    context = {"rotary": _AS_CONFIGURED, "linear_weights": fp8.AS_LOADED} | unknown | context
    mismatch = difference(context, model)
    if mismatch is None:
        return
    field, context_value, model_value = mismatch
    field = {"checksum": "weights", "adapter_layers": "adapters"}.get(field, field)
    remedy = "load the model that encoded it"
    if field == "dtype":
        remedy = f"load the model in {context_value.removeprefix('torch.')} (dtype=, or --dtype)"
    if field == "linear_weights":
        is_fp8 = context_value != fp8.AS_LOADED
        how = 'with weights="fp8" (--weights fp8)' if is_fp8 else "without weights= (--weights)"
        remedy = f"load the model {how}"
    if field == "lookback":
        remedy = "make the engine with the context's lookback and lookback_layers"
    hint = ""
    if field == "config.rope_parameters":
        hint = '; scaling is given with model_kwargs={"rope_scaling": ...}, or --rope-scaling'
    raise ContextMismatchError(
        field,
        f"{name} does not fit: it differs in {field}: {context_value} in the context,"
        f" {model_value} in this model; {remedy}, or encode the context again{hint}",
    )


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def weights_checksum(model: nn.Module, *, fresh: bool = False) -> str:
    """Return the SHA-256 of names and checksums of all parameters and buffers.

    Args:
        model: the transformers model.
        fresh: compute all again; otherwise those of tensors without a sign of a change are kept.
    """
    known = _CHECKSUMS.get(model, {})
    tensors = dict(_tensors(model))
    signs = {name: fingerprint.signs(tensor) for name, tensor in tensors.items()}
    stale = [name for name, sign in signs.items() if fresh or known.get(name, ((), b""))[0] != sign]
    computed = dict(zip(stale, digests(tensors[name] for name in stale), strict=True))
    current = {
        name: (sign, computed[name] if name in computed else known[name][1])
        for name, sign in signs.items()
    }
    _CHECKSUMS[model] = current
    total = hashlib.sha256()
    for name, (_, digest) in current.items():
        total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers by name, in the order of the names."""
    # By name alone: tied tensors may come under equal ones.
    for name, tensor in sorted(
        (*model.named_parameters(), *model.named_buffers()), key=lambda item: item[0]
    ):
        # Rounded by the device, and some models change them while they run: the field `rotary`.
        if "inv_freq" not in name:
            yield name, tensor


def _sampled_weights(model: nn.Module) -> str:
    """Return the SHA-256 of names, shapes and samples of all parameters and buffers."""
    digest, samples = hashlib.sha256(), []
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        samples.append(_sample(tensor.detach()))
    digest.update(torch.cat(to_cpu(samples)).numpy().tobytes())
    return digest.hexdigest()


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
