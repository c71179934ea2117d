"""What `plan` and `estimate` know of a model: its shape and its limits, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from star_attention.hf.loading import files, plain_shape, rope_words
from star_attention.planning.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A model, as options name it.

    Attributes:
        model: folder, GGUF file or hub id.
        location: where in it the model is: arguments of `model_config.load_config`.
        dtype: dtype of the weights.
        rope_scaling: rotary scaling in place of the config's (`--rope-scaling`).
        tensor_parallel: devices that share the weights.
        weights: precision of linear layers (`--weights`); None for `dtype`.
    """

    model: str
    location: dict[str, Any] = field(default_factory=dict)
    dtype: str
    rope_scaling: str | None = None
    tensor_parallel: int = 1
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a config says.

    Attributes:
        shape: sizes that decide the cost.
        text_config: the settings that `hf.loading.positions` reads.
        is_quantized: True if the checkpoint's weights are not the plain ones that are counted.
    """

    shape: ModelShape
    text_config: Any
    is_quantized: bool = False


def read_model(request: ModelRequest) -> ModelFacts:
    """Return what a model's config says; torch is imported only for unusual ones.

    The shape is that of the weights as they are held.

    Raises:
        ModelNotFoundError: If there is no model, or its config cannot be read.
        UnsupportedModelError: If Star Attention cannot run it, or not on so many devices.
        InvalidInputError: If the rotary scaling or the dtype cannot be.
    """
    facts = _as_in_the_files(request)
    if request.weights is None:
        return facts
    return replace(facts, shape=facts.shape.in_fp8())


def _as_in_the_files(request: ModelRequest) -> ModelFacts:
    rotary, _ = rope_words.take({"rope_scaling": request.rope_scaling})
    plain_shape.check_dtype(request.dtype)
    config = files.locate(request.model, request.location).config
    if config is not None and not rotary:
        plain = plain_shape.read(config, request.dtype)
        if plain is not None:
            ranks = request.tensor_parallel
            reasons = plain_shape.reasons_against_shards(config, ranks)
            if reasons:
                raise plain_shape.cannot_shard(plain[0].name, ranks, reasons)
            return ModelFacts(shape=plain[0], text_config=plain[1])
    return _of_transformers(request, rotary)


def _of_transformers(request: ModelRequest, rotary: dict[str, Any]) -> ModelFacts:
    """Build the model without weights, whatever its family."""
    from star_attention.hf.loading import tensor_parallel
    from star_attention.hf.loading.model_config import load_config
    from star_attention.hf.shape import model_shape

    config = load_config(request.model, rotary, **request.location)
    tensor_parallel.check(config, request.tensor_parallel)
    return ModelFacts(
        shape=model_shape(config, request.dtype),
        text_config=config.get_text_config(decoder=True),
        is_quantized=getattr(config, "quantization_config", None) is not None,
    )
