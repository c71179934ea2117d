"""The model: a Llama with fresh weights, and its export. Tensor names end in their axes.

V vocabulary, D hidden size
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from training.settings import Settings


def build_model(settings: Settings, tokenizer: Any) -> LlamaForCausalLM:
    """Return the model with fresh weights, in fp32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=settings.positions,
        rope_parameters={"rope_type": "default", "rope_theta": settings.theta},
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(config)
    # Every layer adds the outputs of these two to the residual stream.
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * settings.layers))
    _plant_sink(model, tokenizer.bos_token_id, settings)
    return model


@torch.no_grad()
def _plant_sink(model: LlamaForCausalLM, bos: int, settings: Settings) -> None:
    """Let every query attend to `<bos>` from the first step on, as those of large models do.

    Queries are recognized by the component that all embeddings but that of `<bos>` share, the key
    of `<bos>` by its embedding. Both are written to the dimension of each head that RoPE turns
    least, so that the score is the same at every distance.
    """
    embed_VD, size = model.get_input_embeddings().weight, settings.hidden // settings.heads
    common_D = F.normalize(torch.randn(settings.hidden), dim=0)
    bos_D = F.normalize(embed_VD[bos], dim=0)
    length = settings.common * 0.02 * math.sqrt(settings.hidden)
    own_D = settings.bos_scale * embed_VD[bos]
    embed_VD += length * common_D
    embed_VD[bos] = own_D
    if not settings.sink:
        return
    # After the first norm, `<bos>` has a component of sqrt(hidden) in its direction, and any other
    # token this share of that in the common direction.
    share = settings.common / math.hypot(1, settings.common)
    factor = math.sqrt(settings.sink * math.sqrt(size) / (share * settings.hidden))
    for layer in model.model.layers:
        slowest = slice(size // 2 - 1, None, size)
        layer.self_attn.q_proj.weight[slowest] += factor * common_D
        layer.self_attn.k_proj.weight[slowest] += factor * bos_D


def export(model: LlamaForCausalLM, tokenizer_folder: Path, out: Path) -> None:
    """Write the model in bf16 as transformers loads it, with the tokenizer's files."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(
        {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    )
    half.generation_config.do_sample = False
    half.save_pretrained(out, max_shard_size="15MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, out / name)
