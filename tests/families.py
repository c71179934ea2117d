"""Tiny random-weight models, one per decoder family, for tests that need a real model but no download.

Sizes are chosen so that no two axes of a tensor have the same length (6 query heads, 3 KV heads, head size 16,
3 or 4 layers, 5 experts, vocabulary 211). Draw token ids from `FIRST_TOKEN`..`LAST_TOKEN`, which avoids every
special token. Sliding windows are 20 tokens, so that they cut inside a context of a hundred.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging import version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

ConfigFactory = Callable[[], PretrainedConfig]

VOCAB_SIZE = 211
FIRST_TOKEN, LAST_TOKEN = 3, 199  # the ids that are ordinary tokens in every family
WINDOW = 20
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [SLIDING, FULL, SLIDING]
MIXED_SHARED = [
    SLIDING,
    FULL,
    SLIDING,
    FULL,
]  # the last two layers read the keys and values of the first two

_TOKENS: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
BASE: dict[str, Any] = _TOKENS | dict(
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
# MLA: queries and keys are 16 + 8 = 24 wide, values 12; the cache holds what is compressed.
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


def _config(class_name: str, *parts: dict[str, Any], **settings: Any) -> ConfigFactory:
    """A factory for `transformers.<class_name>`; later settings win over earlier ones."""
    merged: dict[str, Any] = {}
    for part in (*parts, settings):
        merged |= part

    def make() -> PretrainedConfig:
        # A copy: a config keeps and changes the dicts it is given.
        config: PretrainedConfig = getattr(transformers, class_name)(**copy.deepcopy(merged))
        return config

    return make


def _rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=rope_type, rope_theta=10000.0, **settings))


_LLAMA3_ROPE = _rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_LONGROPE = _rope(
    "longrope",
    factor=8.0,
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[3.0 + 0.5 * i for i in range(8)],
    original_max_position_embeddings=64,
)

FAMILIES: dict[str, ConfigFactory] = {
    # Llama and what differs from it in heads or rotary frequencies only
    "llama": _config("LlamaConfig", BASE),
    "llama_mqa": _config("LlamaConfig", BASE, num_key_value_heads=1),
    "llama_mha": _config("LlamaConfig", BASE, num_key_value_heads=6),
    "llama_dynamic_ntk": _config(
        "LlamaConfig", BASE, _rope("dynamic", factor=4.0), max_position_embeddings=64
    ),
    "llama_yarn": _config(
        "LlamaConfig", BASE, _rope("yarn", factor=8.0, original_max_position_embeddings=64)
    ),
    "llama_llama3scaling": _config("LlamaConfig", BASE, _LLAMA3_ROPE),
    # dense, full attention
    "qwen2": _config("Qwen2Config", DERIVED),
    "qwen3": _config("Qwen3Config", BASE),
    "gemma": _config("GemmaConfig", BASE),
    "phi": _config("PhiConfig", DERIVED),
    "phi3": _config("Phi3Config", DERIVED, sliding_window=None),
    "phi3_longrope": _config(
        "Phi3Config", DERIVED, _LONGROPE, sliding_window=None, original_max_position_embeddings=64
    ),
    "olmo": _config("OlmoConfig", DERIVED),
    "olmo2": _config("Olmo2Config", DERIVED),
    "granite": _config("GraniteConfig", DERIVED, attention_multiplier=0.2, residual_multiplier=0.5),
    "smollm3": _config(
        "SmolLM3Config", DERIVED, no_rope_layers=[1, 0, 1], use_sliding_window=False
    ),
    "cohere": _config("CohereConfig", DERIVED, use_qk_norm=True, logit_scale=1.0),
    "stablelm": _config("StableLmConfig", DERIVED, use_qkv_bias=True, qk_layernorm=True),
    "nemotron": _config("NemotronConfig", BASE),
    "glm": _config("GlmConfig", BASE),
    "glm4": _config("Glm4Config", BASE),
    "ernie4_5": _config("Ernie4_5Config", BASE),
    "hunyuan_v1_dense": _config("HunYuanDenseV1Config", BASE),
    "apertus": _config("ApertusConfig", DERIVED, _LLAMA3_ROPE),
    "seed_oss": _config("SeedOssConfig", BASE),
    "arcee": _config("ArceeConfig", BASE),
    "helium": _config("HeliumConfig", DERIVED, head_dim=16),
    "gpt_neox": _config("GPTNeoXConfig", DERIVED),
    "gpt2": _config(
        "GPT2Config",
        _TOKENS,
        n_embd=96,
        n_head=6,
        n_layer=3,
        n_positions=512,
        initializer_range=0.15,
    ),
    "opt": _config("OPTConfig", DERIVED, ffn_dim=112, word_embed_proj_dim=96),
    # sliding windows on every layer, or on some
    "mistral": _config("MistralConfig", BASE, sliding_window=WINDOW),
    "starcoder2": _config("Starcoder2Config", DERIVED, sliding_window=WINDOW),
    "gemma2": _config(
        "Gemma2Config",
        BASE,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=MIXED,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": _config(
        "Gemma3TextConfig", BASE, query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=MIXED
    ),
    "gemma3_dynamic_ntk": _config(  # rotary frequencies of their own for each layer type
        "Gemma3TextConfig",
        BASE,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=MIXED,
        max_position_embeddings=64,
        rope_parameters={
            FULL: dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
            SLIDING: dict(rope_type="default", rope_theta=1000.0),
        },
    ),
    "gemma3_vlm": _config(  # the multimodal wrapper, used with text only
        "Gemma3Config",
        text_config=BASE | dict(query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=MIXED),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        mm_tokens_per_image=4,
        image_token_index=210,
        boi_token_index=209,
        eoi_token_index=208,
        eos_token_id=2,
    ),
    "olmo3": _config("Olmo3Config", DERIVED, sliding_window=WINDOW, layer_types=MIXED),
    "cohere2": _config(
        "Cohere2Config", BASE, sliding_window=WINDOW, layer_types=MIXED, logit_scale=1.0
    ),
    "exaone4": _config("Exaone4Config", DERIVED, sliding_window=WINDOW, layer_types=MIXED),
    "ministral": _config("MinistralConfig", BASE, sliding_window=WINDOW, layer_types=MIXED),
    "ministral3": _config(  # queries are scaled by position, from the 32nd token on
        "Ministral3Config",
        BASE,
        _rope(
            "yarn",
            factor=16.0,
            original_max_position_embeddings=32,
            llama_4_scaling_beta=0.5,
            max_position_embeddings=512,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        sliding_window=WINDOW,
    ),
    "qwen2_sliding": _config(
        "Qwen2Config",
        DERIVED,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    # attention sinks
    "granite_swa": _config("GraniteSWAConfig", DERIVED, sliding_window=WINDOW, layer_types=MIXED),
    "mimo_v2_flash": _config(  # values narrower than keys, without MLA; KV heads differ between layer types
        "MiMoV2FlashConfig", BASE, ROUTED, v_head_dim=12, sliding_window=WINDOW, layer_types=MIXED
    ),
    "gpt_oss": _config(
        "GptOssConfig",
        BASE,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=MIXED,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
    # KV sharing between layers
    "gemma3n": _config(
        "Gemma3nTextConfig",
        BASE,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        layer_types=MIXED_SHARED,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=None,
    ),
    "gemma4": _config(
        "Gemma4TextConfig",
        BASE,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        layer_types=MIXED_SHARED,
        global_head_dim=32,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
    ),
    # mixtures of experts
    "mixtral": _config(
        "MixtralConfig", BASE, num_local_experts=5, num_experts_per_tok=2, sliding_window=None
    ),
    "phimoe": _config(
        "PhimoeConfig", DERIVED, num_local_experts=5, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "qwen2_moe": _config("Qwen2MoeConfig", DERIVED, EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": _config("Qwen3MoeConfig", BASE, EXPERTS),
    "olmoe": _config("OlmoeConfig", DERIVED, num_experts=5, num_experts_per_tok=2),
    "granitemoe": _config("GraniteMoeConfig", DERIVED, num_local_experts=5, num_experts_per_tok=2),
    "glm4_moe": _config("Glm4MoeConfig", BASE, ROUTED, first_k_dense_replace=1),
    "minimax_m2": _config(
        "MiniMaxM2Config",
        BASE,
        _rope("default", partial_rotary_factor=0.5),
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "ernie4_5_moe": _config(
        "Ernie4_5_MoeConfig", DERIVED, moe_num_experts=5, moe_k=2, moe_intermediate_size=48
    ),
    "hunyuan_v1_moe": _config("HunYuanMoEV1Config", BASE, num_experts=5, moe_topk=2),
    "dots1": _config("Dots1Config", BASE, ROUTED, first_k_dense_replace=1),
    "exaone_moe": _config(
        "ExaoneMoeConfig", BASE, EXPERTS, sliding_window=WINDOW, layer_types=MIXED
    ),
    "cohere2_moe": _config(
        "Cohere2MoeConfig",
        BASE,
        num_experts=5,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=MIXED,
        logit_scale=1.0,
    ),
    # multi-head latent attention: the cache holds compressed keys and values
    "deepseek_v2": _config(
        "DeepseekV2Config",
        MLA,
        ROUTED,
        first_k_dense_replace=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    ),
    "deepseek_v3": _config("DeepseekV3Config", MLA, ROUTED, first_k_dense_replace=1),
    "glm4_moe_lite": _config(
        "Glm4MoeLiteConfig", MLA, ROUTED, mlp_layer_types=["dense", "sparse", "sparse"]
    ),
    "minicpm3": _config("MiniCPM3Config", MLA, scale_emb=1.0, scale_depth=1.7, dim_model_base=96),
    "longcat_flash": _config(  # two attentions, and so two cache layers, in each layer
        "LongcatFlashConfig",
        MLA,
        head_dim=8,
        num_layers=2,
        num_hidden_layers=4,
        ffn_hidden_size=112,
        expert_ffn_hidden_size=48,
        n_routed_experts=5,
        moe_topk=2,
        zero_expert_num=1,
    ),
}
if hasattr(transformers, "InternLM3Config"):  # newer than 5.17
    FAMILIES["internlm3"] = _config("InternLM3Config", BASE)

# Families that run, but whose layers change keys or values between cache and attention other than by MLA.
UNUSUAL: dict[str, ConfigFactory] = {
    # repeats the KV heads (as a tile, not interleaved) after the cache
    "jetmoe": _config(
        "JetMoeConfig", DERIVED, kv_channels=16, num_local_experts=5, num_experts_per_tok=2
    ),
    # attends twice for each cache update, each time with half of the value heads, repeated
    "diffllama": _config("DiffLlamaConfig", DERIVED, num_attention_heads=8, num_key_value_heads=4),
}

_LINEAR_MIX = ["linear_attention", FULL, "linear_attention"]
_ENCODER_DECODER: dict[str, Any] = _TOKENS | dict(d_model=96, decoder_start_token_id=1)

REFUSED: dict[str, ConfigFactory] = {
    # state-space or linear-attention layers carry a recurrent state: there are no keys to attend to
    "mamba": _config("MambaConfig", _TOKENS, hidden_size=96, num_hidden_layers=2, state_size=8),
    "mamba2": _config(
        "Mamba2Config",
        _TOKENS,
        hidden_size=96,
        num_hidden_layers=2,
        state_size=8,
        num_heads=12,
        head_dim=16,
        n_groups=1,
    ),
    "falcon_mamba": _config(
        "FalconMambaConfig", _TOKENS, hidden_size=96, num_hidden_layers=2, state_size=8
    ),
    "rwkv": _config("RwkvConfig", _TOKENS, hidden_size=96, num_hidden_layers=2, context_length=512),
    # the same, mixed with attention layers
    "jamba": _config(
        "JambaConfig",
        DERIVED,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
    ),
    "bamba": _config(
        "BambaConfig",
        DERIVED,
        num_hidden_layers=2,
        attn_layer_indices=[1],
        mamba_n_heads=12,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "falcon_h1": _config(
        "FalconH1Config",
        BASE,
        num_hidden_layers=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    "granitemoehybrid": _config(
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
    "qwen3_next": _config(
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
    "qwen3_5": _config(
        "Qwen3_5TextConfig",
        BASE,
        layer_types=_LINEAR_MIX,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "minimax": _config(
        "MiniMaxConfig",
        BASE,
        layer_types=_LINEAR_MIX,
        block_size=32,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "recurrent_gemma": _config(
        "RecurrentGemmaConfig",
        DERIVED,
        lru_width=96,
        attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "lfm2": _config("Lfm2Config", DERIVED, layer_types=["conv", FULL, "conv"]),
    # chunked attention: a key's visibility depends on absolute chunks, which blocks do not respect
    "llama4": _config(
        "Llama4TextConfig",
        BASE,
        intermediate_size_mlp=112,
        num_local_experts=2,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", FULL, "chunked_attention"],
    ),
    # sparse attention: an indexer with a cache of its own picks the keys
    "deepseek_v32": _config(
        "DeepseekV32Config",
        MLA,
        ROUTED,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "glm_moe_dsa": _config(
        "GlmMoeDsaConfig",
        MLA,
        ROUTED,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    # compressed attention: keys stand for groups of tokens
    "deepseek_v4": _config(
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
    "doge": _config("DogeConfig", DERIVED),
    # encoder-decoder: the context goes through an encoder, not a causal decoder
    "t5": _config("T5Config", _ENCODER_DECODER, d_kv=16, d_ff=112, num_layers=2, num_heads=6),
    "bart": _config(
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
    # attention is not causal
    "bert": _config("BertConfig", DERIVED),
    # modeling code off transformers' attention interface (ALiBi, or old attention classes)
    "bloom": _config("BloomConfig", _TOKENS, hidden_size=96, n_layer=2, n_head=6),
    "mpt": _config("MptConfig", _TOKENS, d_model=96, n_layers=2, n_heads=6),
    "falcon": _config(
        "FalconConfig", _TOKENS, hidden_size=96, num_hidden_layers=2, num_attention_heads=6
    ),
}


# These came to the attention interface with transformers 5.24; before, they are refused.
(REFUSED if version.parse(transformers.__version__) < version.parse("5.24") else FAMILIES).update(
    codegen=_config(
        "CodeGenConfig",
        _TOKENS,
        n_embd=96,
        n_layer=3,
        n_head=4,
        rotary_dim=8,
        initializer_range=0.15,
    ),
    gptj=_config(
        "GPTJConfig", _TOKENS, n_embd=96, n_layer=3, n_head=6, rotary_dim=8, initializer_range=0.15
    ),
)


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int
) -> PreTrainedModel:
    """A model of `FAMILIES`, `UNUSUAL` or `REFUSED` in eval mode; it never stops at EOS and pads with token 0.

    The weights of any `dtype` are those of float32, rounded. Vectors (norms, biases, sinks), which start out
    as ones or zeros, are random too, so that leaving one out shows. sizes: other values for fields of the config.
    """

    def factory() -> PretrainedConfig:
        config = (FAMILIES | UNUSUAL | REFUSED)[name]()
        for field, size in sizes.items():
            setattr(config.get_text_config(decoder=True), field, size)
        return config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_config(factory(), torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                scale = 1.0 if "sink" in parameter_name else 0.2
                parameter.data += scale * torch.randn_like(parameter)
    if dtype is not torch.float32:
        rounded = _from_config(factory(), dtype)
        rounded.load_state_dict(model.state_dict())
        model = rounded
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.eval()
    return model


def _from_config(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model
