"""Tiny models with random weights, one per decoder family: real models without a download.

Draw token ids from `FIRST_TOKEN`..`LAST_TOKEN`, which avoids every special token.
"""

from __future__ import annotations

import torch
import transformers
from packaging import version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.family_configs import (
    BASE,
    DERIVED,
    EXPERTS,
    FIRST_TOKEN,
    FULL,
    LAST_TOKEN,
    LLAMA3_ROPE,
    LONGROPE,
    MIXED,
    MIXED_SHARED,
    MLA,
    ROUTED,
    SLIDING,
    TOKENS,
    VOCAB_SIZE,
    WINDOW,
    ConfigFactory,
    config,
    rope,
)
from tests.refused_families import REFUSED

__all__ = ["FAMILIES", "FIRST_TOKEN", "LAST_TOKEN", "REFUSED", "UNUSUAL", "build"]

FAMILIES: dict[str, ConfigFactory] = {
    # Llama, and families that differ from it in heads or rotary frequencies only
    "llama": config("LlamaConfig", BASE),
    "llama_mqa": config("LlamaConfig", BASE, num_key_value_heads=1),
    "llama_mha": config("LlamaConfig", BASE, num_key_value_heads=6),
    "llama_dynamic_ntk": config(
        "LlamaConfig", BASE, rope("dynamic", factor=4.0), max_position_embeddings=64
    ),
    "llama_yarn": config(
        "LlamaConfig", BASE, rope("yarn", factor=8.0, original_max_position_embeddings=64)
    ),
    "llama_llama3scaling": config("LlamaConfig", BASE, LLAMA3_ROPE),
    # dense, full attention
    "qwen2": config("Qwen2Config", DERIVED),
    "qwen3": config("Qwen3Config", BASE),
    "gemma": config("GemmaConfig", BASE),
    "phi": config("PhiConfig", DERIVED),
    "phi3": config("Phi3Config", DERIVED, sliding_window=None),
    "phi3_longrope": config(
        "Phi3Config", DERIVED, LONGROPE, sliding_window=None, original_max_position_embeddings=64
    ),
    "olmo": config("OlmoConfig", DERIVED),
    "olmo2": config("Olmo2Config", DERIVED),
    "granite": config("GraniteConfig", DERIVED, attention_multiplier=0.2, residual_multiplier=0.5),
    "smollm3": config("SmolLM3Config", DERIVED, no_rope_layers=[1, 0, 1], use_sliding_window=False),
    "cohere": config("CohereConfig", DERIVED, use_qk_norm=True, logit_scale=1.0),
    "stablelm": config("StableLmConfig", DERIVED, use_qkv_bias=True, qk_layernorm=True),
    "nemotron": config("NemotronConfig", BASE),
    "glm": config("GlmConfig", BASE),
    "glm4": config("Glm4Config", BASE),
    "ernie4_5": config("Ernie4_5Config", BASE),
    "hunyuan_v1_dense": config("HunYuanDenseV1Config", BASE),
    "apertus": config("ApertusConfig", DERIVED, LLAMA3_ROPE),
    "seed_oss": config("SeedOssConfig", BASE),
    "arcee": config("ArceeConfig", BASE),
    "helium": config("HeliumConfig", DERIVED, head_dim=16),
    "gpt_neox": config("GPTNeoXConfig", DERIVED),
    "gpt2": config(
        "GPT2Config",
        TOKENS,
        n_embd=96,
        n_head=6,
        n_layer=3,
        n_positions=512,
        initializer_range=0.15,
    ),
    "opt": config("OPTConfig", DERIVED, ffn_dim=112, word_embed_proj_dim=96),
    # sliding windows on every layer, or on some
    "mistral": config("MistralConfig", BASE, sliding_window=WINDOW),
    "starcoder2": config("Starcoder2Config", DERIVED, sliding_window=WINDOW),
    "gemma2": config(
        "Gemma2Config",
        BASE,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=MIXED,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": config(
        "Gemma3TextConfig", BASE, query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=MIXED
    ),
    # rotary frequencies differ between layer types
    "gemma3_dynamic_ntk": config(
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
    # the multimodal wrapper, used with text only
    "gemma3_vlm": config(
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
    "olmo3": config("Olmo3Config", DERIVED, sliding_window=WINDOW, layer_types=MIXED),
    "cohere2": config(
        "Cohere2Config", BASE, sliding_window=WINDOW, layer_types=MIXED, logit_scale=1.0
    ),
    "exaone4": config("Exaone4Config", DERIVED, sliding_window=WINDOW, layer_types=MIXED),
    "ministral": config("MinistralConfig", BASE, sliding_window=WINDOW, layer_types=MIXED),
    # queries are scaled by position, from the 32nd token on
    "ministral3": config(
        "Ministral3Config",
        BASE,
        rope(
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
    "qwen2_sliding": config(
        "Qwen2Config",
        DERIVED,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    # attention sinks
    "granite_swa": config("GraniteSWAConfig", DERIVED, sliding_window=WINDOW, layer_types=MIXED),
    # values narrower than keys, without MLA; KV heads differ between layer types
    "mimo_v2_flash": config(
        "MiMoV2FlashConfig", BASE, ROUTED, v_head_dim=12, sliding_window=WINDOW, layer_types=MIXED
    ),
    "gpt_oss": config(
        "GptOssConfig",
        BASE,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=MIXED,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
    # KV sharing between layers
    "gemma3n": config(
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
    "gemma4": config(
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
    "mixtral": config(
        "MixtralConfig", BASE, num_local_experts=5, num_experts_per_tok=2, sliding_window=None
    ),
    "phimoe": config(
        "PhimoeConfig", DERIVED, num_local_experts=5, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "qwen2_moe": config("Qwen2MoeConfig", DERIVED, EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": config("Qwen3MoeConfig", BASE, EXPERTS),
    "olmoe": config("OlmoeConfig", DERIVED, num_experts=5, num_experts_per_tok=2),
    "granitemoe": config("GraniteMoeConfig", DERIVED, num_local_experts=5, num_experts_per_tok=2),
    "glm4_moe": config("Glm4MoeConfig", BASE, ROUTED, first_k_dense_replace=1),
    "minimax_m2": config(
        "MiniMaxM2Config",
        BASE,
        rope("default", partial_rotary_factor=0.5),
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "ernie4_5_moe": config(
        "Ernie4_5_MoeConfig", DERIVED, moe_num_experts=5, moe_k=2, moe_intermediate_size=48
    ),
    "hunyuan_v1_moe": config("HunYuanMoEV1Config", BASE, num_experts=5, moe_topk=2),
    "dots1": config("Dots1Config", BASE, ROUTED, first_k_dense_replace=1),
    "exaone_moe": config(
        "ExaoneMoeConfig", BASE, EXPERTS, sliding_window=WINDOW, layer_types=MIXED
    ),
    "cohere2_moe": config(
        "Cohere2MoeConfig",
        BASE,
        num_experts=5,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=MIXED,
        logit_scale=1.0,
    ),
    # multi-head latent attention: the cache holds compressed keys and values
    "deepseek_v2": config(
        "DeepseekV2Config",
        MLA,
        ROUTED,
        first_k_dense_replace=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    ),
    "deepseek_v3": config("DeepseekV3Config", MLA, ROUTED, first_k_dense_replace=1),
    "glm4_moe_lite": config(
        "Glm4MoeLiteConfig", MLA, ROUTED, mlp_layer_types=["dense", "sparse", "sparse"]
    ),
    "minicpm3": config("MiniCPM3Config", MLA, scale_emb=1.0, scale_depth=1.7, dim_model_base=96),
    # two attentions, and so two cache layers, in each layer
    "longcat_flash": config(
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
# Newer than transformers 5.17.
if hasattr(transformers, "InternLM3Config"):
    FAMILIES["internlm3"] = config("InternLM3Config", BASE)

# Families that run, but change keys or values between cache and attention in other ways than MLA.
UNUSUAL: dict[str, ConfigFactory] = {
    # repeats the KV heads (as a tile, not interleaved) after the cache
    "jetmoe": config(
        "JetMoeConfig", DERIVED, kv_channels=16, num_local_experts=5, num_experts_per_tok=2
    ),
    # attends twice for each cache update, each time with half of the value heads, repeated
    "diffllama": config("DiffLlamaConfig", DERIVED, num_attention_heads=8, num_key_value_heads=4),
}

# These use the attention interface since transformers 5.24, and are refused before.
_since_5_24 = (
    FAMILIES if version.parse(transformers.__version__) >= version.parse("5.24") else REFUSED
)
_since_5_24.update(
    codegen=config(
        "CodeGenConfig",
        TOKENS,
        n_embd=96,
        n_layer=3,
        n_head=4,
        rotary_dim=8,
        initializer_range=0.15,
    ),
    gptj=config(
        "GPTJConfig", TOKENS, n_embd=96, n_layer=3, n_head=6, rotary_dim=8, initializer_range=0.15
    ),
)


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int
) -> PreTrainedModel:
    """Build a model in eval mode, which never stops at EOS and pads with token 0.

    Vectors (norms, biases, sinks), which models initialize to ones or zeros, are random too, so
    that leaving one out shows.

    Args:
        name: family of `FAMILIES`, `UNUSUAL` or `REFUSED`.
        dtype: precision; weights are those of float32, rounded.
        seed: seed of the weights.
        sizes: values for fields of the config.
    """

    def factory() -> PretrainedConfig:
        model_config = (FAMILIES | UNUSUAL | REFUSED)[name]()
        for field, size in sizes.items():
            setattr(model_config.get_text_config(decoder=True), field, size)
        return model_config

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


def _from_config(model_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(model_config, dtype=dtype)
    return model
