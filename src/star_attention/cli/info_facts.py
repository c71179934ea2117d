"""The facts that `star-attention info` shows, as JSON values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.loading import checks, files
from star_attention.hf.loading.packages import quantization
from star_attention.hf.loading.weight_formats import WEIGHTS

_WEIGHT_FILES = ("*.safetensors", "*.bin")


def of_context(path: str) -> dict[str, Any]:
    """Describe a saved context, from its header alone.

    Raises:
        ContextFileError: If it is damaged, or something else.
    """
    from star_attention.storage.header import plan_in, read_header

    header = read_header(path)
    plan = plan_in(header)
    identity, chat, source = header["identity"], header["chat"], header.get("source") or {}
    config, weights = identity["config"], identity.get("linear_weights")
    talk = header.get("conversation")
    turns = None if talk is None else len(talk["turns"])
    return {
        "kind": "saved context" if talk is None else "saved conversation",
        "path": path,
        "file_bytes": _size(Path(path)),
        "context_tokens": plan.context_tokens,
        "turns": turns,
        "method": header["method"],
        "block_size": plan.block_size,
        "blocks": plan.num_blocks,
        "anchor_size": plan.anchor_size,
        "lookback": plan.lookback,
        "lookback_layers": plan.lookback_layers if plan.lookback else None,
        "saved_by_ranks": len(header["parts"]) if "parts" in header else 1,
        "kv_dtype": header.get("kv_dtype") or identity["dtype"].removeprefix("torch."),
        "kv_windows": header.get("kv_windows", "all"),
        "dtype": identity["dtype"].removeprefix("torch."),
        "weights": weights if weights in WEIGHTS else None,
        "model": source.get("model"),
        "adapter": source.get("adapter"),
        "family": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "has_tokenizer": identity.get("tokenizer") is not None,
        "chat": chat is not None,
        "chat_template_kwargs": (chat or {}).get("template_kwargs") or None,
        "held_back_tokens": len((header.get("end") or {}).get("held_ids", ())),
        "encode_s": round(header["encode_s"], 3),
    }


def of_model(name: str, location: dict[str, Any]) -> dict[str, Any]:
    """Describe a model, from its config and the names of its files.

    Args:
        name: Folder, GGUF file, folder of an adapter, or hub id.
        location: Arguments of `from_pretrained` that say where in it the model is.

    Raises:
        ModelNotFoundError: If there is no model.
    """
    model = files.locate(name, location)

    from star_attention.hf.loading.model_config import load_config
    from star_attention.hf.loading.positions import max_positions

    config = load_config(name, **location)
    from star_attention.hf.loading import support

    text = config.get_text_config(decoder=True)
    reasons = [*support.reasons(config), *checks.adapter_reasons(model)]
    facts: dict[str, Any] = {
        "kind": "model",
        "path": name,
        "file_bytes": _weights_size(model),
        "family": config.model_type,
        "supported": not reasons,
        "reasons": reasons or None,
        "base": model.path if model.adapter is not None else None,
        "layers": getattr(text, "num_hidden_layers", None),
        "heads": getattr(text, "num_attention_heads", None),
        "positions": max_positions(text),
        "vocabulary": getattr(text, "vocab_size", None),
        "quantization": quantization(model.config or {}),
    }
    if not reasons:
        facts |= _shape(config)
    return facts | {
        "tokenizer": None if model.folder is None else model.tokenizer_source is not None,
        "chat_template": _has_chat_template(model),
    }


def _shape(config: Any) -> dict[str, Any]:
    """Return what a forward without data shows of a model's sizes."""
    from star_attention.hf.shape import model_shape

    try:
        shape = model_shape(config)
    except (InvalidInputError, UnsupportedModelError):
        # Some models cannot run without weights.
        return {}
    widest = max(shape.attention, key=lambda call: call.heads)
    return {
        "layers": shape.layers,
        "windowed_layers": sum(call.window is not None for call in shape.attention),
        "heads": widest.heads,
        "kv_heads": widest.kv_heads,
        "key_size": widest.k_head_size,
        "parameters": shape.parameters,
        "bytes_per_parameter": shape.bytes_per_element,
        "weight_bytes": shape.weight_bytes,
        "fp8_weight_bytes": shape.in_fp8().weight_bytes if shape.quantizable_parameters else None,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
    }


def _size(path: Path) -> int:
    """Return the bytes of a file, or of a folder's files."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size


def _weights_size(model: files.ModelFiles) -> int | None:
    """Return the bytes of a model's weights on disk; None if they are not here."""
    if model.gguf_file is not None:
        return _size(model.gguf_file)
    if model.folder is None:
        return None
    found = [file for pattern in _WEIGHT_FILES for file in model.folder.glob(pattern)]
    return sum(map(_size, found)) or None


def _has_chat_template(model: files.ModelFiles) -> bool | None:
    """True if a tokenizer's files hold a chat template; None if they would have to be loaded."""
    if model.folder is None or model.gguf_file is not None or model.tokenizer_source is None:
        return None
    folder = Path(model.tokenizer_source) / str(model.location.get("subfolder") or "")
    if model.tokenizer_source == model.adapter:
        folder = Path(model.adapter)
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(settings.get("chat_template"))
