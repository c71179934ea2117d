"""Which layers have a sliding window: as the layer types say, not the config's window alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    VaultGemmaConfig,
)

from star_attention import StarLLM
from tests.engines import as_stock, ids

WINDOW, LAYERS = 16, 4
SHAPE: dict[str, Any] = dict(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=WINDOW,
)
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (VaultGemmaConfig(**SHAPE, layer_types=[FULL] * LAYERS), [None] * LAYERS),
        (VaultGemmaConfig(**SHAPE, layer_types=[SLIDING] * LAYERS), [WINDOW] * LAYERS),
        (Gemma2Config(**SHAPE), [WINDOW, None] * 2),
        (MistralConfig(**SHAPE), [WINDOW] * LAYERS),
        (MistralConfig(**SHAPE | {"sliding_window": None}), [None] * LAYERS),
        (Qwen2Config(**SHAPE, use_sliding_window=False), [None] * LAYERS),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=2),
            [None] * 2 + [WINDOW] * 2,
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else str(value),
)
def test_windows_are_those_of_the_layer_types(
    config: PretrainedConfig, windows: list[int | None]
) -> None:
    """Forbids a window for layers that the config calls full: VaultGemma states one for none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    star = StarLLM(model, method="dense")
    assert star.runtime.handle.windows == windows
    prompt = ids(90)
    with torch.no_grad(), as_stock(model):
        stock = model(torch.tensor([[*prompt, 5]]), use_cache=False).logits[0, -1].float()
    torch.testing.assert_close(
        star.logits(star.encode(prompt), [5])[-1], stock, atol=1e-5, rtol=1e-4
    )
