"""Write tiny GGUF files, as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tests.engines import BUNDLED

# Names of GGUF by the names of transformers; `%` stands for a layer's number.
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.%.input_layernorm.weight": "blk.%.attn_norm.weight",
    "model.layers.%.post_attention_layernorm.weight": "blk.%.ffn_norm.weight",
    "model.layers.%.self_attn.q_proj.weight": "blk.%.attn_q.weight",
    "model.layers.%.self_attn.k_proj.weight": "blk.%.attn_k.weight",
    "model.layers.%.self_attn.v_proj.weight": "blk.%.attn_v.weight",
    "model.layers.%.self_attn.o_proj.weight": "blk.%.attn_output.weight",
    "model.layers.%.mlp.gate_proj.weight": "blk.%.ffn_gate.weight",
    "model.layers.%.mlp.up_proj.weight": "blk.%.ffn_up.weight",
    "model.layers.%.mlp.down_proj.weight": "blk.%.ffn_down.weight",
}
_NORMAL, _CONTROL = 1, 3


def write_llama(path: Path, model: Any) -> Path:
    """Write a Llama model in float32 with the bundled model's tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, weight in model.state_dict().items():
        layer = next((part for part in name.split(".") if part.isdecimal()), "")
        gguf_name = _NAMES[name.replace(f".{layer}.", ".%.")].replace("%", layer)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                weight = _interleaved(weight, count)
        writer.add_tensor(gguf_name, np.ascontiguousarray(weight.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return a weight whose rotary halves alternate, as llama.cpp rotates them."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any) -> None:
    rules = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = rules["model"]["vocab"] | {
        token["content"]: token["id"] for token in rules["added_tokens"]
    }
    special = {token["content"] for token in rules["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocabulary["<bos>"])
    writer.add_eos_token_id(vocabulary["<eos>"])
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}<|q|>{{ m.content }}<|a|>{% endfor %}")
