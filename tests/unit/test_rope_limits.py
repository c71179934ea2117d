"""The positions of a model, as configs of its family mean them: numbers of published models."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from star_attention.hf.loading.positions import doubt, max_positions

FACTORS = [1.0] * 48


def llama3(factor: float) -> dict[str, Any]:
    return dict(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def yarn(factor: float, original: int) -> dict[str, Any]:
    return dict(rope_type="yarn", factor=factor, original_max_position_embeddings=original)


def longrope(**more: Any) -> dict[str, Any]:
    return dict(type="longrope", short_factor=FACTORS, long_factor=FACTORS, **more)


PUBLISHED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "llama 2": (LlamaConfig, dict(max_position_embeddings=4096), 4096),
    "llama 3": (LlamaConfig, dict(max_position_embeddings=8192), 8192),
    "llama 3.1": (
        LlamaConfig,
        dict(max_position_embeddings=131072, rope_scaling=llama3(8.0)),
        131072,
    ),
    "llama 3.2, whose factor is no ratio of lengths": (
        LlamaConfig,
        dict(max_position_embeddings=131072, rope_scaling=llama3(32.0)),
        131072,
    ),
    "llama 3 stretched by its own type": (
        LlamaConfig,
        dict(max_position_embeddings=8192, rope_scaling=llama3(8.0)),
        65536,
    ),
    "llama 2, linear": (
        LlamaConfig,
        dict(max_position_embeddings=4096, rope_scaling=dict(type="linear", factor=4.0)),
        16384,
    ),
    "llama 2, dynamic NTK": (
        LlamaConfig,
        dict(max_position_embeddings=4096, rope_scaling=dict(type="dynamic", factor=2.0)),
        8192,
    ),
    "mistral 0.3": (MistralConfig, dict(max_position_embeddings=32768), 32768),
    "qwen 2.5": (Qwen2Config, dict(max_position_embeddings=32768), 32768),
    "qwen 2.5, as its card says for long texts": (
        Qwen2Config,
        dict(max_position_embeddings=32768, rope_scaling=yarn(4.0, 32768)),
        131072,
    ),
    "qwen 2.5, config edited to the long length": (
        Qwen2Config,
        dict(max_position_embeddings=131072, rope_scaling=yarn(4.0, 32768)),
        131072,
    ),
    "qwen 3": (Qwen3Config, dict(max_position_embeddings=40960), 40960),
    "qwen 3, as its card says for long texts": (
        Qwen3Config,
        dict(max_position_embeddings=40960, rope_scaling=yarn(4.0, 32768)),
        131072,
    ),
    "phi 3 mini 4k": (Phi3Config, dict(max_position_embeddings=4096), 4096),
    "phi 3 mini 128k": (
        Phi3Config,
        dict(
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling=longrope(),
        ),
        131072,
    ),
    "minicpm 4, trained to 32k": (
        LlamaConfig,
        dict(
            max_position_embeddings=32768,
            rope_scaling=longrope(original_max_position_embeddings=32768),
        ),
        32768,
    ),
    "gemma 3 1b": (Gemma3TextConfig, dict(max_position_embeddings=32768), 32768),
    "gemma 3 4b, which states the final length": (
        Gemma3TextConfig,
        dict(
            max_position_embeddings=131072,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
        131072,
    ),
    "deepseek v2": (
        DeepseekV2Config,
        dict(
            max_position_embeddings=163840,
            rope_scaling=yarn(40, 4096) | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
        163840,
    ),
    "deepseek v3": (
        DeepseekV3Config,
        dict(
            max_position_embeddings=163840,
            rope_scaling=yarn(40, 4096) | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
        163840,
    ),
    "gpt-oss": (GptOssConfig, dict(), 131072),
    "olmo 3": (
        Olmo3Config,
        dict(max_position_embeddings=65536, rope_scaling=yarn(8.0, 8192)),
        65536,
    ),
    "granite 3.3": (
        GraniteConfig,
        dict(max_position_embeddings=131072, rope_theta=1e7),
        131072,
    ),
    "command r, whose first training was shorter": (
        CohereConfig,
        dict(max_position_embeddings=8192, model_max_length=131072),
        131072,
    ),
    "command r 7b": (Cohere2Config, dict(max_position_embeddings=132096), 132096),
    "gpt-2": (GPT2Config, dict(n_positions=1024), 1024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_limit_is_the_published_length(name: str) -> None:
    """Forbids one reading of `factor` for all: Llama 3.2 and Gemma 3 4B got 262,144 and 1M."""
    kind, settings, positions = PUBLISHED[name]
    assert max_positions(kind(**settings).get_text_config(decoder=True)) == positions


LINEAR = dict(type="linear", factor=8.0)
DOUBTFUL: dict[str, tuple[Any, dict[str, Any], int]] = {
    "llama 2 7b 32k, which states the final length": (
        LlamaConfig,
        dict(max_position_embeddings=32768, rope_scaling=LINEAR),
        32768,
    ),
    "deepseek coder, which states the final length": (
        LlamaConfig,
        dict(max_position_embeddings=16384, rope_scaling=dict(type="linear", factor=4.0)),
        16384,
    ),
    "qwen 2.5 1m, with another attention for the rest": (
        Qwen2Config,
        dict(
            max_position_embeddings=1010000,
            dual_chunk_attention_config=dict(
                chunk_size=262144, local_size=8192, original_max_position_embeddings=262144
            ),
        ),
        262144,
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_limit_that_is_not_sure(name: str) -> None:
    """Forbids 8 x 32,768 tokens for a model of 32K, without a word."""
    kind, settings, length = DOUBTFUL[name]
    config = kind(**settings).get_text_config(decoder=True)
    unsure = doubt(config)
    assert unsure is not None
    assert unsure.length == length
    limit = max_positions(config)
    assert limit is not None
    assert limit > length


@pytest.mark.parametrize("name", PUBLISHED)
def test_limits_that_are_sure(name: str) -> None:
    kind, settings, _ = PUBLISHED[name]
    config = kind(**settings).get_text_config(decoder=True)
    assert (doubt(config) is None) == (name != "llama 2, linear")


def test_the_authors_field_for_the_final_length_leaves_no_doubt() -> None:
    settings: dict[str, Any] = dict(max_position_embeddings=4096, rope_scaling=LINEAR)
    assert doubt(LlamaConfig(**settings, max_sequence_length=32768)) is None
    assert doubt(LlamaConfig(**settings, max_sequence_length=4096)) is not None
