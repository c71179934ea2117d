"""Settings and helpers of the tiny models' configs (`tests.families`, `tests.refused_families`).

Sizes are chosen so that no two axes of a tensor have the same length: 6 query heads, 3 KV heads,
head size 16, 3 or 4 layers, 5 experts, vocabulary 211. Sliding windows are 20 tokens, so that they
cut inside a context of a hundred.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig

ConfigFactory = Callable[[], PretrainedConfig]

VOCAB_SIZE = 211
# Ids that are ordinary tokens in every family.
FIRST_TOKEN, LAST_TOKEN = 3, 199
WINDOW = 20
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [SLIDING, FULL, SLIDING]
# The last two layers read the keys and values of the first two.
MIXED_SHARED = [SLIDING, FULL, SLIDING, FULL]

TOKENS: dict[str, Any] = dict(vocab_size=VOCAB_SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BASE: dict[str, Any] = TOKENS | dict(
    hidden_size=72,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.15,
)
# Families without a `head_dim` of their own derive it: 96 / 6 = 16.
DERIVED: dict[str, Any] = {k: v for k, v in BASE.items() if k != "head_dim"} | dict(hidden_size=96)
EXPERTS: dict[str, Any] = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=48)
# MLA: queries and keys have 16 + 8 = 24 elements, values 12; the cache holds compressed ones.
MLA: dict[str, Any] = DERIVED | dict(
    num_key_value_heads=6,
    q_lora_rank=36,
    kv_lora_rank=20,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
)
ROUTED: dict[str, Any] = dict(
    n_routed_experts=5,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    n_group=1,
    topk_group=1,
)


def config(class_name: str, *parts: dict[str, Any], **settings: Any) -> ConfigFactory:
    """Make a factory of `transformers.<class_name>`; later settings override earlier ones."""
    merged: dict[str, Any] = {}
    for part in (*parts, settings):
        merged |= part

    def factory() -> PretrainedConfig:
        # A copy: a config stores and changes the dicts that it is passed.
        config_class = getattr(transformers, class_name)
        return config_class(**copy.deepcopy(merged))  # type: ignore[no-any-return]

    return factory


def rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=rope_type, rope_theta=10000.0, **settings))


LLAMA3_ROPE = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONGROPE = rope(
    "longrope",
    factor=8.0,
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[3.0 + 0.5 * i for i in range(8)],
    original_max_position_embeddings=64,
)
