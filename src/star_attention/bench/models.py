"""The model to measure: from a folder, or random weights in the shapes of a known model."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from star_attention.config import check_dtype
from star_attention.distributed import Comm, SoloComm
from star_attention.errors import InvalidInputError, quote
from star_attention.hf.loading import fp8, load
from star_attention.hf.loading import tensor_parallel as shards
from star_attention.hf.loading.pretrained import load_pretrained
from star_attention.hf.loading.weight_formats import check_name

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
    "smollm2-135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "deepseek-v2-lite": dict(
        model_type="deepseek_v2",
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        topk_method="greedy",
        vocab_size=102400,
    ),
    # Five of six layers have a window of 1,024 tokens.
    "gemma-3-4b": dict(
        model_type="gemma3_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
        vocab_size=262208,
    ),
    "gemma-3-12b": dict(
        model_type="gemma3_text",
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        sliding_window=1024,
        vocab_size=262208,
    ),
}
"""Known models, Llamas if not said otherwise. Speed depends on shapes alone: weights are random."""

_ROPE = {"rope_type": "default", "rope_theta": 500000.0}

_POSITIONS = 2**21


def load_model(
    model: str | None,
    shapes: str | None,
    *,
    dtype: str,
    device: str,
    comm: Comm | None = None,
    tensor_parallel: int = 1,
    weights: str | None = None,
) -> Any:
    """Load a model, or build one with random weights on the device, in evaluation mode. Collective.

    Args:
        model: folder or hub id.
        shapes: a name in `SHAPES`, instead of a model.
        dtype: "auto" takes the checkpoint's precision; for random weights bfloat16 on a GPU and
            float32 on a CPU.
        device: "auto", or a torch device; "auto" and "cuda" are each rank's own GPU.
        comm: the ranks; None for this process alone.
        tensor_parallel: ranks that share the weights of one model.
        weights: "fp8" for linear layers in fp8, as for `StarLLM.from_pretrained`.

    Raises:
        InvalidInputError: unless exactly one of model and shapes is given, and for unknown shapes.
        UnsupportedModelError: the model cannot be sharded.
    """
    comm = comm or SoloComm()
    if (model is None) == (shapes is None):
        raise InvalidInputError("give either a model (-m) or the shapes of one (--shapes)")
    if model is not None:
        return load_pretrained(
            model,
            comm,
            tensor_parallel=tensor_parallel,
            dtype=dtype,
            device=device,
            model_kwargs={},
            weights=weights,
        )[0]
    if shapes not in SHAPES:
        raise InvalidInputError(
            f"shapes {quote(shapes)} are unknown; choose one of {', '.join(SHAPES)}"
        )
    if comm.size % tensor_parallel:
        raise InvalidInputError(
            f"tensor_parallel {tensor_parallel} does not divide the number of ranks, {comm.size};"
            " give a divisor of it"
        )
    if comm.size > 1:
        device = load.device_of_rank(device)
    check_name(weights)
    built = _random_model(shapes, check_dtype(dtype), torch.device(load.pick_device(device)))
    if weights is not None:
        fp8.quantize(built, fp8.layers(built), None)
    if tensor_parallel > 1:
        shard_model(built, comm, tensor_parallel)
    return built


def shard_model(model: Any, comm: Comm, tensor_parallel: int) -> None:
    """Reduce a whole model to this rank's shard, in place. Collective.

    Raises:
        UnsupportedModelError: the model cannot be sharded.
    """
    shards.check(model.config, tensor_parallel)
    with comm.collective("startup"):
        mesh = comm.on(next(model.parameters()).device, tensor_parallel)
    shards.shard(model, mesh)


def _config(shapes: str) -> Any:
    """Return the config of a known model, for contexts of any length."""
    sizes = {"model_type": "llama", **SHAPES[shapes], "max_position_embeddings": _POSITIONS}
    rope: dict[str, Any] = _ROPE
    if "sliding_window" in sizes:
        rope = {"full_attention": _ROPE, "sliding_attention": _ROPE}
    config = AutoConfig.for_model(**sizes, rope_parameters=rope)
    config.name_or_path = shapes
    return config


def _random_model(shapes: str, dtype: str, device: torch.device) -> Any:
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    config = _config(shapes)
    default_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        with device:
            model = AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(default_dtype)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    return model


def random_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer for a model with random weights: every id has a text of its own.

    Ids are bytes, then pairs of letters, then words of four of them.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [first + second for first in letters for second in letters]
    words = islice(product(pairs, pairs), max(0, vocab_size - 256 - len(pairs)))
    merges: list[tuple[str, str]] = [*product(letters, letters), *words]
    tokens = [*sorted(ByteLevel.alphabet()), *map("".join, merges)][:vocab_size]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [merge for merge in merges if "".join(merge) in vocabulary]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def model_name(model: Any) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def weight_bytes(model: Any) -> int:
    return int(sum(weight.numel() * weight.element_size() for weight in model.parameters()))


def weight_bytes_per_token(model: Any) -> int:
    """Bytes of the weights that a forward of one token reads.

    These are all weights but the input embedding, of which one row is read, unless it is tied to
    the head, and but the experts that a token is not routed to.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    total = weight_bytes(model) - _idle_expert_bytes(model)
    return total if tied else total - int(embedding.numel() * embedding.element_size())


def _idle_expert_bytes(model: Any) -> int:
    """Bytes of experts that a token is not routed to: all experts of a layer are one tensor."""
    routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    idle = 0
    for module in model.modules() if routed else ():
        experts = getattr(module, "num_experts", None)
        for weight in module.parameters(recurse=False):
            if weight.dim() == 3 and weight.shape[0] == experts:
                nbytes = weight.numel() * weight.element_size()
                idle += nbytes * max(0, experts - routed) // experts
    return idle


def random_ids(model: Any, tokens: int, seed: int = 0) -> torch.Tensor:
    """Return random ids of ordinary tokens, int64 `[tokens]` on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(min(100, vocabulary // 2), vocabulary, (tokens,), generator=generator)
