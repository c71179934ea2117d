"""The law of Star Attention on whole models, slow on purpose: what every fast path is compared with.

One eager forward over all tokens with explicit additive masks, and nothing from `star_attention`. The law:

    keep[i, j] = j <= i  and  layer_rule(i, j)  and
                 (i is query or generated  or  block(i) == block(j)  or  j < anchor_size)

With one block (`block_size >= context_len`) this is ordinary dense attention.

Axes: `B` batch, `L` tokens, `T` generated tokens, `V` vocabulary, `G` KV heads, `D` head size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Mask = torch.Tensor | dict[str, torch.Tensor]  # what a model takes as `attention_mask`

_LENGTH_DEPENDENT = (
    "dynamic",
    "longrope",
)  # the rotary types that choose frequencies by the length they see


@dataclass(frozen=True, kw_only=True)
class OracleResult:
    """Logits of every token, and the keys and values of every token for each layer that caches any.

    `kv` holds what the cache holds: compressed for MLA, and nothing for a layer that reads another layer's.
    """

    logits_BLV: torch.Tensor
    kv: list[tuple[torch.Tensor, torch.Tensor]]  # (k_BGLD, v_BGLD); the two D may differ


def law_mask(
    context_len: int, total_len: int, block_size: int, anchor_size: int, window: int | None = None
) -> torch.Tensor:
    """The law as a bool mask `[total_len, total_len]`: True where token `i` (row) sees token `j` (column).

    `window` is a sliding layer's own rule, by absolute position: `i - j < window`.
    """
    i, j = torch.arange(total_len)[:, None], torch.arange(total_len)[None, :]
    same_block = i // block_size == j // block_size
    keep = (j <= i) & ((i >= context_len) | same_block | (j < anchor_size))
    return keep if window is None else keep & (i - j < window)


@torch.no_grad()
def oracle_forward(
    model: PreTrainedModel,
    ids_BL: torch.Tensor,
    *,
    context_len: int,
    block_size: int,
    anchor_size: int,
    rope_length: int | None = None,
) -> OracleResult:
    """Logits, keys and values of `ids_BL` (context, then query, then generated tokens) under the law.

    For models in float32. `rope_length` is the length for which length-dependent rotary frequencies are taken;
    `None` takes that of `ids_BL`. Afterwards the model's settings and rotary state are what they were.
    """
    B, L = ids_BL.shape
    mask = layer_masks(
        model, lambda window: law_mask(context_len, L, block_size, anchor_size, window)
    )
    cache = DynamicCache()  # given no config, it keeps every token even in sliding layers
    with eager_attention(model), pinned_rope(model, L if rope_length is None else rope_length):
        output = model(
            input_ids=ids_BL,
            attention_mask=mask,
            position_ids=torch.arange(L, device=ids_BL.device).expand(B, L),
            use_cache=True,
            **cached(model, cache),
        )
    return OracleResult(logits_BLV=output.logits, kv=cached_kv(cache))


def oracle_generate(
    model: PreTrainedModel,
    ids_BL: torch.Tensor,
    *,
    context_len: int,
    block_size: int,
    anchor_size: int,
    steps: int,
    rope_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy `(tokens_BT, logits_BTV)`, `T = steps`: all tokens go through `oracle_forward` at each step."""
    tokens: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    for _ in range(steps):
        result = oracle_forward(
            model,
            torch.cat([ids_BL, *(token_B[:, None] for token_B in tokens)], dim=1),
            context_len=context_len,
            block_size=block_size,
            anchor_size=anchor_size,
            rope_length=rope_length,
        )
        logits.append(result.logits_BLV[:, -1])
        tokens.append(logits[-1].argmax(-1))
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def cached(model: nn.Module, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The argument that hands a cache to a forward: transformers calls it `cache` since 5.24."""
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {word: cache}


def layer_masks(model: PreTrainedModel, keep: Callable[[int | None], torch.Tensor]) -> Mask:
    """What `model` takes as `attention_mask` so that each layer gets the additive mask of its window.

    `keep(window)` gives the bool mask `[Q, K]` of a layer with that window, or of a full layer for `None`;
    the result holds `[1, 1, Q, K]` in float32.
    """
    config = model.config.get_text_config(decoder=True)
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or [])
    assert layer_types <= {"full_attention", "sliding_attention"}, (
        f"no law for layers of {layer_types}"
    )

    def additive(window: int | None) -> torch.Tensor:
        allowed = keep(window)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return mask[None, None].to(model.device)

    if len(layer_types) > 1:
        return {"full_attention": additive(None), "sliding_attention": additive(window)}
    # Without layer types, the window (where there is one) rules every layer. With them it rules only sliding
    # layers: configs of full layers may still hold a window (Qwen2-MoE: 0).
    return additive(None if layer_types == {"full_attention"} else window)


def cached_kv(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values `(k_BGLD, v_BGLD)` of each layer that has any."""
    kv: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            kv.append((layer.keys, layer.values))
    return kv


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Every part of `model` uses eager attention inside, and what it used before afterwards."""
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            configs[id(config)] = config
    # Not through the public setter, which also writes to sub-configs: each has a setting of its own to restore.
    saved = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = saved[key]


@contextlib.contextmanager
def pinned_rope(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Rotary frequencies inside are those of a sequence of `length` tokens, whatever a forward sees.

    Changes only LongRoPE and dynamic NTK; their state afterwards is exactly what it was.
    """
    saved: list[tuple[nn.Module, str, object]] = []

    def replace(module: nn.Module, name: str, value: object) -> None:
        saved.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        for module in model.modules():
            rope_type = getattr(module, "rope_type", None)  # a name, or a name for each layer type
            if isinstance(rope_type, str):
                if rope_type in _LENGTH_DEPENDENT:
                    replace(module, "inv_freq", _inv_freq(module, rope_type, None, length))
                    replace(module, "rope_type", "default")  # which turns the update in forward off
            elif isinstance(rope_type, dict):
                pinned = {
                    layer_type: name
                    for layer_type, name in rope_type.items()
                    if name in _LENGTH_DEPENDENT
                }
                for layer_type, name in pinned.items():
                    replace(
                        module,
                        f"{layer_type}_inv_freq",
                        _inv_freq(module, name, layer_type, length),
                    )
                replace(module, "rope_type", rope_type | dict.fromkeys(pinned, "default"))
        yield
    finally:
        for module, name, value in reversed(saved):
            setattr(module, name, value)


def _inv_freq(
    module: nn.Module, rope_type: str, layer_type: str | None, length: int
) -> torch.Tensor:
    # The length goes in as a tensor, as it does in the stock forward: the dynamic base is then rounded alike.
    inv_freq: torch.Tensor
    inv_freq, _scaling = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, torch.device("cpu"), seq_len=torch.tensor(length), layer_type=layer_type
    )
    return inv_freq.to(next(module.buffers()).device)
