"""The `ModelShape` of a config: the model is built without weights and run once without data.

On torch's meta device a model has shapes but no data. One forward of a few tokens through our own
attention hook shows what every layer stores and attends with, whatever the family calls its
settings, and torch's own counter gives the cost of the matrix products.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from star_attention.attention.attend import Rule
from star_attention.attention.state import State
from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.cache.base import ForwardPosition, build_layers
from star_attention.hf.cache.probe import TOKENS, ProbeCache, ProbeLayer, no_stores, run_probe
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import fp8, plain_shape, support, tensor_parallel
from star_attention.planning.model_shape import AttentionShape, ModelShape


@dataclass(kw_only=True)
class _Record(ForwardPosition):
    """Sizes and operations observed in one forward without data."""

    counter: FlopCounterMode
    attention: list[AttentionShape] = field(default_factory=list)
    kv_elements: Counter[int] = field(default_factory=Counter)
    kv_rows: int = 0
    expansion_flops: int = 0
    flops_at_append: int = 0


class _RecordingLayer(ProbeLayer[_Record]):
    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        record = self.position
        record.kv_elements[self.index] += (k_BGSD.numel() + v_BGSD.numel()) // TOKENS
        record.kv_rows += k_BGSD.shape[1] + v_BGSD.shape[1]
        record.flops_at_append = record.counter.get_total_flops()
        return super().append(k_BGSD, v_BGSD)

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        record = self.position
        # Operations since `append` expanded the stored keys and values.
        if self.kv.expands:
            record.expansion_flops += record.counter.get_total_flops() - record.flops_at_append
        call = AttentionShape(
            heads=q_BQHD.shape[2],
            kv_heads=k_BKGD.shape[2],
            k_head_size=k_BKGD.shape[3],
            v_head_size=v_BKGD.shape[3],
            window=rule.window,
            compressed_size=0 if self.latent is None else self.latent.compressed_size,
            rotary_size=0 if self.latent is None else k_BKGD.shape[3] - self.latent.plain_size,
        )
        record.attention.append(call)
        return super().attend(q_BQHD, k_BKGD, v_BKGD, rule)


def model_shape(config: Any, dtype: str = "auto") -> ModelShape:
    """Return the shape of a config's model.

    Args:
        config: a transformers config.
        dtype: precision of the weights; "auto" takes the config's, or float32 if it names none.

    Raises:
        UnsupportedModelError: Star Attention cannot run the model.
        InvalidInputError: an unknown dtype, or a model whose code reads values while it runs, so
            that it cannot run without weights.
    """
    reasons = support.reasons(config)
    if reasons:
        raise UnsupportedModelError(str(config.model_type), reasons)
    torch_dtype = _dtype(config, dtype)
    model = _without_weights(config, torch_dtype)
    handle = ModelHandle(model)
    try:
        with FlopCounterMode(display=False) as counter:
            record = _Record(counter=counter)
            layers = build_layers(
                _RecordingLayer, handle.windows, record, no_stores(handle.windows)
            )
            run_probe(handle, ProbeCache(layers, record))
    except (RuntimeError, NotImplementedError) as error:
        raise InvalidInputError(
            f"the cost of {config.model_type} cannot be derived from its config: its code reads"
            " values while it runs; encode a short context and look at its nbytes and encode_s"
            " instead"
        ) from error
    head = model.get_output_embeddings()
    quantizable = [layer.weight for _, layer in fp8.layers(model)]
    sharded = [] if tensor_parallel.reasons(config, 1) else list(tensor_parallel.layers(model))
    # Outputs that tensor parallelism sums over its ranks.
    summed = [module.out_features for _, module, style in sharded if style == "rowwise"]
    summed += [module.down_proj.shape[1] for _, module, style in sharded if style == "experts"]
    return ModelShape(
        name=str(config.model_type),
        layers=len(handle.windows),
        hidden_size=handle.config.hidden_size,
        attention=tuple(record.attention),
        kv_elements_by_layer=tuple(record.kv_elements[layer.index] for layer in layers),
        kv_scales_per_token=record.kv_rows,
        linear_parameters=(counter.get_total_flops() - record.expansion_flops) // (2 * TOKENS),
        sharded_parameters=sum(
            weight.numel()
            for _, module, _ in sharded
            for weight in module.parameters(recurse=False)
        ),
        all_reduced_elements_per_token=sum(summed),
        all_reduces=len(summed),
        expansion_parameters=record.expansion_flops // (2 * TOKENS),
        head_parameters=0 if head is None else head.weight.numel(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_per_element=torch_dtype.itemsize,
        quantizable_parameters=sum(weight.numel() for weight in quantizable),
        quantizable_rows=sum(len(weight) for weight in quantizable),
    )


def _dtype(config: Any, dtype: str) -> torch.dtype:
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise plain_shape.unknown_dtype(dtype)
        return named
    stated = getattr(config, "dtype", None) or getattr(
        config.get_text_config(decoder=True), "dtype", None
    )
    return stated if isinstance(stated, torch.dtype) else torch.float32


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    # Building a model writes to its config.
    config = copy.deepcopy(config)
    # Some models search the ids for padding, which needs values.
    config.pad_token_id = config.get_text_config(decoder=True).pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # The other implementations of mixtures of experts sort tokens by value. This one multiplies
    # each token with just the experts it is routed to. Models without a choice would log that.
    if getattr(model, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("batched_mm")
    return model.eval()
