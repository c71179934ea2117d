"""The law of Star Attention on whole models: slow, and what every fast path is compared with.

It is one eager forward over all tokens with explicit additive masks, and uses nothing of
`star_attention`. The law:

    keep[i, j] = j <= i  and  layer_rule(i, j)  and
                 (i is query or generated  or  block(i) == block(j)  or  j < anchor_size  or
                  (layer in lookback_layers  and  0 < block(i) - block(j) <= lookback))

With one block (`block_size >= context_len`) this is ordinary dense attention.

Axes: `B` batch, `L` tokens, `T` generated tokens, `V` vocabulary, `G` KV heads, `D` head size.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Mask = torch.Tensor | dict[str, torch.Tensor]
"""A model's `attention_mask`: one for all layers, or one for each layer type."""

# The rotary types whose frequencies depend on the length of the sequence.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True)
class OracleResult:
    """Logits, keys and values of every token.

    Attributes:
        logits_BLV: logits.
        kv: `(k_BGLD, v_BGLD)` of each layer that caches any, compressed for MLA; the head sizes of
            keys and values may differ.
    """

    logits_BLV: torch.Tensor
    kv: list[tuple[torch.Tensor, torch.Tensor]]


def law_mask(
    context_len: int,
    total_len: int,
    block_size: int,
    anchor_size: int,
    window: int | None = None,
    lookback: int = 0,
) -> torch.Tensor:
    """Return the law as a bool mask `[total_len, total_len]`: True if token i (row) sees token j.

    `window` is the rule of a sliding layer, by absolute position: `i - j < window`.
    """
    i, j = torch.arange(total_len)[:, None], torch.arange(total_len)[None, :]
    blocks_back = i // block_size - j // block_size
    keep = (j <= i) & ((i >= context_len) | (blocks_back <= lookback) | (j < anchor_size))
    return keep if window is None else keep & (i - j < window)


@torch.no_grad()
def oracle_forward(
    model: PreTrainedModel,
    ids_BL: torch.Tensor,
    *,
    context_len: int,
    block_size: int,
    anchor_size: int,
    lookback: int = 0,
    lookback_layers: Collection[int] = (),
    rope_length: int | None = None,
) -> OracleResult:
    """Run a model in float32 under the law, and leave its settings and rotary state as they were.

    Args:
        model: the model.
        ids_BL: ids of context, query and generated tokens.
        context_len: tokens of the context.
        block_size: tokens of a block.
        anchor_size: tokens of the anchor.
        lookback: blocks before its own that a block sees in `lookback_layers`.
        lookback_layers: numbers of these layers.
        rope_length: length for which length-dependent rotary frequencies are taken; that of
            `ids_BL` by default.
    """
    B, L = ids_BL.shape

    def masks(lookback: int) -> Mask:
        return layer_masks(
            model,
            lambda window: law_mask(context_len, L, block_size, anchor_size, window, lookback),
        )

    mask = masks(0)
    # Without a config the cache stores every token, even in sliding layers.
    cache = DynamicCache()
    with (
        eager_attention(model),
        pinned_rope(model, L if rope_length is None else rope_length),
        other_masks(model, lookback_layers, mask, masks(lookback)),
    ):
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
    lookback: int = 0,
    lookback_layers: Collection[int] = (),
    rope_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode `steps` tokens greedily, all tokens through `oracle_forward` at each step.

    Returns:
        The tokens, `[B, T]`, and their logits, `[B, T, V]`.
    """
    tokens: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    for _ in range(steps):
        result = oracle_forward(
            model,
            torch.cat([ids_BL, *(token_B[:, None] for token_B in tokens)], dim=1),
            context_len=context_len,
            block_size=block_size,
            anchor_size=anchor_size,
            lookback=lookback,
            lookback_layers=lookback_layers,
            rope_length=rope_length,
        )
        logits.append(result.logits_BLV[:, -1])
        tokens.append(logits[-1].argmax(-1))
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def cached(model: nn.Module, cache: DynamicCache) -> dict[str, DynamicCache]:
    """Return the argument by which a forward takes a cache: `cache` since transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def layer_masks(model: PreTrainedModel, visible: Callable[[int | None], torch.Tensor]) -> Mask:
    """Return the `attention_mask` that gives each layer the additive mask of its window.

    Args:
        model: the model.
        visible: makes the bool mask `[Q, K]` of layers with a window, or of full layers for None.

    Returns:
        A float32 mask `[1, 1, Q, K]`, or one for each layer type.
    """
    config = model.config.get_text_config(decoder=True)
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or [])
    assert layer_types <= {"full_attention", "sliding_attention"}, (
        f"no law for layers of {layer_types}"
    )

    def additive(window: int | None) -> torch.Tensor:
        allowed = visible(window)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return mask[None, None].to(model.device)

    if len(layer_types) > 1:
        return {"full_attention": additive(None), "sliding_attention": additive(window)}
    # Without layer types, a window applies to every layer. With them it applies to sliding layers
    # only: configs of full layers may have a window, too (Qwen2-MoE: 0).
    return additive(None if layer_types == {"full_attention"} else window)


@contextlib.contextmanager
def other_masks(
    model: PreTrainedModel, layers: Collection[int], usual: Mask, other: Mask
) -> Iterator[None]:
    """Give some layers other masks than the model passes them, for the block."""
    pairs = [(usual, other)]
    if isinstance(usual, dict) and isinstance(other, dict):
        pairs = [(usual[name], other[name]) for name in usual]
    swapped: set[int] = set()

    def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def other_than(value: Any) -> Any:
            for mask, instead in pairs:
                if isinstance(value, torch.Tensor) and torch.equal(value, mask):
                    swapped.add(module.layer_idx)
                    return instead
            return value

        return tuple(map(other_than, args)), {k: other_than(v) for k, v in kwargs.items()}

    handles = [
        module.register_forward_pre_hook(swap, with_kwargs=True)
        for module in model.modules()
        if getattr(module, "layer_idx", None) in layers
        and re.search("ttention|MLA$", type(module).__name__)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert swapped == set(layers), "every layer that looks back takes a mask"


def cached_kv(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values, `(k_BGLD, v_BGLD)`, of each layer that has any."""
    kv: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            kv.append((layer.keys, layer.values))
    return kv


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch every part of a model to eager attention for the length of the block."""
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            configs[id(config)] = config
    # Not through the public setter, which also writes to sub-configs: each has its own setting.
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
    """Fix rotary frequencies to those of a sequence of `length` tokens, for the block.

    Changes only LongRoPE and dynamic NTK, and restores their state exactly.
    """
    saved: list[tuple[nn.Module, str, object]] = []

    def replace(module: nn.Module, name: str, value: object) -> None:
        saved.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        for module in model.modules():
            # A name, or a name for each layer type.
            rope_type = getattr(module, "rope_type", None)
            if isinstance(rope_type, str):
                if rope_type in _LENGTH_DEPENDENT:
                    replace(module, "inv_freq", _inv_freq(module, rope_type, None, length))
                    # Turns the update in the module's forward off.
                    replace(module, "rope_type", "default")
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
    # A tensor, as in the stock forward, so that the dynamic base is rounded in the same way.
    inv_freq: torch.Tensor
    inv_freq, _scaling = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, torch.device("cpu"), seq_len=torch.tensor(length), layer_type=layer_type
    )
    return inv_freq.to(next(module.buffers()).device)
