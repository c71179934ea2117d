"""The model that is measured: one from a folder, or random weights of a known model's shapes, made on the device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from star_attention.errors import InvalidInputError
from star_attention.hf.loading import load

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "llama-3.2-1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}
"""Speed depends on shapes alone, so that no weights need to be there."""

_POSITIONS = 2**21


def model_of(model: str | None, shapes: str | None, *, dtype: str, device: str) -> Any:
    """A loaded model in evaluation mode.

    dtype: "auto" is the checkpoint's, and for random weights bfloat16 on a GPU and float32 on a CPU.

    Raises `InvalidInputError` unless exactly one of both is given.
    """
    if (model is None) == (shapes is None):
        raise InvalidInputError("give either a model (-m) or the shapes of one (--shapes)")
    if model is not None:
        return load.load(model, dtype=dtype, device=device, model_kwargs={})[0]
    if shapes not in SHAPES:
        raise InvalidInputError(f"shapes {shapes!r} are unknown; choose one of {', '.join(SHAPES)}")
    place = torch.device(load.pick_device(device))
    kind = load.check_dtype(dtype)
    if kind == "auto":
        kind = "bfloat16" if place.type == "cuda" else "float32"
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**SHAPES[shapes], max_position_embeddings=_POSITIONS, rope_parameters=rope)
    config.name_or_path = shapes
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, kind))
        with place:
            built = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(place).manual_seed(0)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    return built


def name_of(model: Any) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def weight_bytes_per_token(model: Any) -> int:
    """Weights that are read for one token: all but the input embedding (of which one row is), unless it is the head, too."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    total: int = sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters()
    )
    return total if tied else total - int(embedding.numel() * embedding.element_size())


def random_ids(model: Any, tokens: int, seed: int = 0) -> torch.Tensor:
    """Ordinary token ids, int64 `[tokens]` on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(min(100, vocabulary // 2), vocabulary, (tokens,), generator=generator)
