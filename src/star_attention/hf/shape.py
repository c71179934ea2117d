"""The cost-relevant shape of a model, from its config alone: built without weights and run once without numbers.

On torch's meta device a model has shapes but no data. One forward of a few tokens through our own attention hook shows what
every layer keeps and attends with, whatever the family calls its settings; torch's own counter says what the matrix products cost.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from star_attention.attention.attend import Rule
from star_attention.attention.state import State
from star_attention.distributed import SoloComm
from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.cache.base import StarCache
from star_attention.hf.cache.probe import TOKENS, ProbeLayer, ProbePlace
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import support, tensor_parallel
from star_attention.planning.cost import AttentionShape, ModelShape


class _Record(ProbePlace):
    """What one forward without numbers shows."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.attention: list[AttentionShape] = []
        self.kv_numbers = self.kv_rows = self.kv_layers = 0
        self.flops_at_keep = 0
        self.expansion_flops = 0


class _RecordingLayer(ProbeLayer):
    place: _Record

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        self.place.kv_layers += 1
        self.place.kv_numbers += (k_BGSD.numel() + v_BGSD.numel()) // TOKENS
        self.place.kv_rows += k_BGSD.shape[1] + v_BGSD.shape[1]
        self.place.flops_at_keep = self.place.counter.get_total_flops()
        return super().keep(k_BGSD, v_BGSD)

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        if self.kv.expands:  # what ran since `keep` made keys and values of what is kept
            self.place.expansion_flops += (
                self.place.counter.get_total_flops() - self.place.flops_at_keep
            )
        call = AttentionShape(
            heads=q_BQHD.shape[2],
            kv_heads=k_BKGD.shape[2],
            k_head_size=k_BKGD.shape[3],
            v_head_size=v_BKGD.shape[3],
            window=rule.window,
        )
        self.place.attention.append(call)
        return super().attend(q_BQHD, k_BKGD, v_BKGD, rule)


def model_shape(config: Any, dtype: str = "auto") -> ModelShape:
    """The shape of a config's model; `dtype` "auto" is the config's own, float32 where it names none.

    Raises `UnsupportedModelError` for models that cannot run, and `InvalidInputError` for the few whose code looks at values while
    it runs, so that nothing can be said without weights.
    """
    reasons = support.reasons(config)
    if reasons:
        raise UnsupportedModelError(str(config.model_type), reasons)
    torch_dtype = _dtype(config, dtype)
    model = _without_weights(config, torch_dtype)
    handle = ModelHandle(model)
    ids_1S = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    positions_1S = torch.arange(TOKENS, device="meta")[None]
    try:
        with FlopCounterMode(display=False) as counter:
            record = _Record(counter)
            layers = [_RecordingLayer(i, record, window) for i, window in enumerate(handle.windows)]
            handle.encode(
                ids_1S,
                positions_1S,
                StarCache(layers, record, SoloComm()),
                2 * TOKENS if handle.rotaries else None,
            )
    except (RuntimeError, NotImplementedError) as error:
        raise InvalidInputError(
            f"the cost of {config.model_type} cannot be worked out from its config: its code looks at values while it"
            " runs; encode a short context and look at its nbytes and encode_s instead"
        ) from error
    head = model.get_output_embeddings()
    cut = [] if tensor_parallel.reasons(config, 1) else list(tensor_parallel.layers(model))
    summed = [module.out_features for _, module, style in cut if style == "rowwise"]
    summed += [module.down_proj.shape[1] for _, module, style in cut if style == "experts"]
    return ModelShape(
        name=str(config.model_type),
        layers=len(handle.windows),
        hidden_size=handle.config.hidden_size,
        attention=tuple(record.attention),
        kv_numbers_per_token=record.kv_numbers,
        kv_rows_per_token=record.kv_rows,
        kv_layers=record.kv_layers,
        linear_parameters=(counter.get_total_flops() - record.expansion_flops) // (2 * TOKENS),
        cut_parameters=sum(
            weight.numel() for _, module, _ in cut for weight in module.parameters(recurse=False)
        ),
        summed_numbers_per_token=sum(summed),
        sums=len(summed),
        expansion_parameters=record.expansion_flops // (2 * TOKENS),
        head_parameters=0 if head is None else head.weight.numel(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_per_number=torch_dtype.itemsize,
    )


def _dtype(config: Any, dtype: str) -> torch.dtype:
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise InvalidInputError(
                f"dtype {dtype!r} is unknown; use auto, float32, bfloat16 or float16"
            )
        return named
    stated = getattr(config, "dtype", None) or getattr(
        config.get_text_config(decoder=True), "dtype", None
    )
    return stated if isinstance(stated, torch.dtype) else torch.float32


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(config)  # building a model writes into its config
    # Some models search the ids for padding, which needs values.
    config.pad_token_id = config.get_text_config(decoder=True).pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # The other implementations of mixtures of experts sort tokens by value. This one multiplies just what a token goes to.
    # (Models without a choice say so by a log line, which is of no use here.)
    if getattr(model, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("batched_mm")
    return model.eval()
