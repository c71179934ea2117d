"""Tiny models of families that are refused, each with the reason."""

from __future__ import annotations

from typing import Any

from tests.family_configs import (
    BASE,
    DERIVED,
    EXPERTS,
    FULL,
    MLA,
    ROUTED,
    TOKENS,
    WINDOW,
    ConfigFactory,
    config,
)

_LINEAR_MIX = ["linear_attention", FULL, "linear_attention"]
_ENCODER_DECODER: dict[str, Any] = TOKENS | dict(d_model=96, decoder_start_token_id=1)

REFUSED: dict[str, ConfigFactory] = {
    # state-space or linear-attention layers carry a recurrent state: there are no keys to attend to
    "mamba": config("MambaConfig", TOKENS, hidden_size=96, num_hidden_layers=2, state_size=8),
    "mamba2": config(
        "Mamba2Config",
        TOKENS,
        hidden_size=96,
        num_hidden_layers=2,
        state_size=8,
        num_heads=12,
        head_dim=16,
        n_groups=1,
    ),
    "falcon_mamba": config(
        "FalconMambaConfig", TOKENS, hidden_size=96, num_hidden_layers=2, state_size=8
    ),
    "rwkv": config("RwkvConfig", TOKENS, hidden_size=96, num_hidden_layers=2, context_length=512),
    # the same, mixed with attention layers
    "jamba": config(
        "JambaConfig",
        DERIVED,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
    ),
    "bamba": config(
        "BambaConfig",
        DERIVED,
        num_hidden_layers=2,
        attn_layer_indices=[1],
        mamba_n_heads=12,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "falcon_h1": config(
        "FalconH1Config",
        BASE,
        num_hidden_layers=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    "granitemoehybrid": config(
        "GraniteMoeHybridConfig",
        DERIVED,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        num_local_experts=5,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        mamba_n_heads=12,
        mamba_d_head=16,
        mamba_d_state=8,
    ),
    "qwen3_next": config(
        "Qwen3NextConfig",
        BASE,
        EXPERTS,
        layer_types=_LINEAR_MIX,
        shared_expert_intermediate_size=48,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "qwen3_5": config(
        "Qwen3_5TextConfig",
        BASE,
        layer_types=_LINEAR_MIX,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "minimax": config(
        "MiniMaxConfig",
        BASE,
        layer_types=_LINEAR_MIX,
        block_size=32,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "recurrent_gemma": config(
        "RecurrentGemmaConfig",
        DERIVED,
        lru_width=96,
        attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "lfm2": config("Lfm2Config", DERIVED, layer_types=["conv", FULL, "conv"]),
    # chunked attention: a key's visibility depends on absolute chunks, which blocks do not respect
    "llama4": config(
        "Llama4TextConfig",
        BASE,
        intermediate_size_mlp=112,
        num_local_experts=2,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", FULL, "chunked_attention"],
    ),
    # sparse attention: an indexer with a cache of its own picks the keys
    "deepseek_v32": config(
        "DeepseekV32Config",
        MLA,
        ROUTED,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "glm_moe_dsa": config(
        "GlmMoeDsaConfig",
        MLA,
        ROUTED,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    # compressed attention: keys stand for groups of tokens
    "deepseek_v4": config(
        "DeepseekV4Config",
        BASE,
        ROUTED,
        qk_rope_head_dim=8,
        q_lora_rank=36,
        o_groups=2,
        o_lora_rank=20,
        index_n_heads=2,
        index_head_dim=16,
        partial_rotary_factor=0.5,
    ),
    # a learned bias for each key, computed from the values, is written into the mask
    "doge": config("DogeConfig", DERIVED),
    # encoder-decoder: the context goes through an encoder, not a causal decoder
    "t5": config("T5Config", _ENCODER_DECODER, d_kv=16, d_ff=112, num_layers=2, num_heads=6),
    "bart": config(
        "BartConfig",
        _ENCODER_DECODER,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=112,
        decoder_ffn_dim=112,
        max_position_embeddings=512,
    ),
    # bidirectional attention
    "bert": config("BertConfig", DERIVED),
    # modeling code that does not use transformers' attention interface (ALiBi, old classes)
    "bloom": config("BloomConfig", TOKENS, hidden_size=96, n_layer=2, n_head=6),
    "mpt": config("MptConfig", TOKENS, d_model=96, n_layers=2, n_heads=6),
    "falcon": config(
        "FalconConfig", TOKENS, hidden_size=96, num_hidden_layers=2, num_attention_heads=6
    ),
}
