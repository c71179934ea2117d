"""Tensor parallelism: the ranks of one cp rank hold shards of a model's heads and MLPs.

The model's own plan says which layers are sharded (`tp_plan` in transformers, with the names of
Megatron-LM, arXiv 1909.08053): a rank keeps a part of the outputs of a "colwise" layer, and a part
of the inputs of a "rowwise" one, whose results are summed over the tp ranks. Embeddings and
language-model head stay whole on every rank.

transformers' `apply_tensor_parallelism` and torch's `parallelize_module` do the same over torch's
default group, whose collectives wait forever for a dead rank. Here they go through our
communicator, and nothing depends on where a release of transformers keeps its function.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from star_attention.distributed.comm import Comm
from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.execution import sums
from star_attention.hf.loading import files, identity, load, support
from star_attention.hf.loading.model_config import load_config, location_kwargs
from star_attention.hf.loading.plain_shape import cannot_shard, indivisible
from star_attention.linear.fp8 import Fp8Linear

_SHARDED = ("colwise", "rowwise")
_EXPERTS = ("packed_colwise", "moe_tp_experts")
# Styles whose layers give the same result if they are not sharded.
_WHOLE = (
    "replicated_with_grad_allreduce",
    "embedding_rowwise",
    "colwise_gather_output",
    "rowwise_split_input",
)
ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
"""Projections of attention that are sharded by heads, and their styles."""
# Config fields of MLPs that need their whole width at once (Gemma 3n).
_WHOLE_WIDTH = ("activation_sparsity_pattern",)
_SIZES = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "intermediate_size",
)


@dataclass(frozen=True, kw_only=True)
class ModelShard:
    """The mesh and identity of a sharded model.

    Attributes:
        comm: the mesh of the ranks that hold the other shards.
        identity: identity of the whole model.
    """

    comm: Comm
    identity: dict[str, Any]


_SHARDS: weakref.WeakKeyDictionary[nn.Module, ModelShard] = weakref.WeakKeyDictionary()


def model_shard(model: Any) -> ModelShard | None:
    """Return the `ModelShard` of a sharded model; None for a whole one."""
    model = support.unwrap(model)
    return _SHARDS.get(model) if isinstance(model, nn.Module) else None


def reasons(config: Any, tensor_parallel: int) -> list[str]:
    """Return why a model cannot be sharded over `tensor_parallel` ranks; empty if it can."""
    text_config = config.get_text_config(decoder=True)
    plan: dict[str, str] = getattr(text_config, "base_model_tp_plan", None) or {}
    styles = {name.rpartition(".")[2]: style for name, style in plan.items()}
    unknown = sorted(set(plan.values()) - {*_SHARDED, *_EXPERTS, *_WHOLE})
    reasons = []
    if not plan:
        reasons.append(f"transformers has no tensor-parallel plan for {text_config.model_type}")
    elif unknown:
        reasons.append(
            f"its tensor-parallel plan has layers of the kinds {', '.join(unknown)}, which are not"
            " implemented"
        )
    elif any(styles.get(name) != style for name, style in ATTENTION.items()):
        reasons.append("its tensor-parallel plan does not shard the attention heads")
    if needs_whole_width(text_config):
        reasons.append("its MLP needs its whole width at once")
    if any(
        getattr(part, "quantization_config", None) is not None for part in (config, text_config)
    ):
        reasons.append("its weights are quantized")
    for field in _SIZES:
        for size in sorted(_sizes(text_config, field)):
            if size % tensor_parallel:
                reasons.append(indivisible(field, size, tensor_parallel))
    return reasons


def check(config: Any, tensor_parallel: int) -> None:
    """Check that a config's model can be sharded over `tensor_parallel` ranks.

    Raises:
        UnsupportedModelError: it cannot, with the reasons.
    """
    against = reasons(config, tensor_parallel) if tensor_parallel > 1 else []
    if against:
        raise cannot_shard(config.model_type, tensor_parallel, against)


def needs_whole_width(config: Any) -> bool:
    """Return True if the MLPs of a config's model need their whole width at once."""
    return any(getattr(config, field, None) is not None for field in _WHOLE_WIDTH)


def _sizes(config: Any, field: str) -> set[int]:
    """Return a size of all layers, which may differ between them."""
    sizes: set[int] = set()
    for layer_config in (config, *(getattr(config, "per_layer_config", None) or ())):
        # A config whose layers differ refuses to name one value for all of them.
        with suppress(RuntimeError):
            value = getattr(layer_config, field, None)
            values = [value] if isinstance(value, int) else value or ()
            sizes.update(size for size in values if isinstance(size, int))
    return sizes


def load_shard(
    path: str | os.PathLike[str],
    comm: Comm,
    tensor_parallel: int,
    *,
    dtype: str,
    device: str,
    model_kwargs: dict[str, Any],
    adapter: str | os.PathLike[str] | None = None,
    weights: str | None = None,
) -> tuple[Any, Any]:
    """Load this rank's shard of a model, in evaluation mode, and the tokenizer. Collective.

    Each rank reads the whole checkpoint into host memory; the tp ranks of a cp rank take turns.

    Args:
        path: folder or hub id.
        comm: the ranks; `tensor_parallel` divides their number.
        tensor_parallel: ranks that share the weights of one model.
        dtype: precision, as for `load.load`.
        device: where the shard is moved to.
        model_kwargs: for `AutoModelForCausalLM.from_pretrained`.
        adapter: an adapter that was asked for, which cannot be sharded.
        weights: precision of linear layers, as for `load.load`. Their scales are those of the whole
            layers, which pass through the device one by one.

    Raises:
        UnsupportedModelError: the model cannot be sharded, with the reasons.
        StarAttentionError: whatever `load.load` raises.
    """
    with comm.collective("startup"):
        mesh = comm.on(torch.device(load.pick_device(device)), tensor_parallel)
    loaded: tuple[Any, Any] | None = None

    def load_and_shard() -> tuple[Any, Any]:
        _check_model_kwargs(model_kwargs, tensor_parallel)
        location = location_kwargs(model_kwargs)
        _check_no_adapter(files.locate(path, location, adapter), tensor_parallel)
        check(load_config(path, **location), tensor_parallel)
        place = load.pick_device(device)
        model, tokenizer = load.load(
            path,
            dtype=dtype,
            device="cpu",
            model_kwargs=model_kwargs,
            weights=weights,
            quantize_on=place,
        )
        shard(model, mesh)
        return model.to(place), tokenizer

    for turn in range(tensor_parallel):
        failure: Exception | None = None
        if turn == mesh.tp_rank:
            loaded, failure = _attempt(load_and_shard)
        with comm.collective("loading the model"):
            comm.raise_if_any_failed(failure)
    assert loaded is not None
    return loaded


def _check_no_adapter(model_files: files.ModelFiles, tensor_parallel: int) -> None:
    if model_files.adapter is not None:
        raise InvalidInputError(
            f"tensor_parallel {tensor_parallel} does not work with the adapter"
            f" {model_files.adapter}; merge it into the model first, or load without"
            " tensor_parallel"
        )


def _attempt(
    call: Callable[[], tuple[Any, Any]],
) -> tuple[tuple[Any, Any] | None, Exception | None]:
    """Return the result of a call, or the exception that it raised."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def _check_model_kwargs(model_kwargs: dict[str, Any], tensor_parallel: int) -> None:
    for name in ("device_map", "quantization_config", "tp_plan", "distributed_config"):
        if name in model_kwargs:
            raise InvalidInputError(
                f"tensor_parallel {tensor_parallel} does not work with {name} in model_kwargs;"
                " leave one of them out"
            )


def shard(model: Any, comm: Comm) -> None:
    """Reduce a loaded model to this rank's shard, in place.

    Raises:
        UnsupportedModelError: layers are not as the plan assumes.
    """
    whole = identity.model_identity(model, model)
    for name, module, style in list(layers(model)):
        try:
            if style == "experts":
                _shard_experts(module, comm)
            else:
                _shard_linear(module, style, comm)
        except _OddLayerError as error:
            raise UnsupportedModelError(type(model).__name__, [f"{name} {error}"]) from None
    for module in model.get_decoder().modules():
        if not isinstance(getattr(module, "q_proj", None), nn.Linear):
            continue
        odd = weight_for_each_head(module)
        if odd is not None:
            raise UnsupportedModelError(
                type(model).__name__,
                [f"its attention has weights for each head ({odd}) that its plan leaves out"],
            )
    _SHARDS[support.unwrap(model)] = ModelShard(comm=comm, identity=whole)
    model.save_pretrained = _refuse_to_save


def weight_for_each_head(attention: nn.Module) -> str | None:
    """Return the name of a weight for each head that no plan shards, None if there is none."""
    for name, weight in attention.named_parameters():
        if weight.dim() > 1 and name.partition(".")[0] not in ATTENTION:
            return name
    return None


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InvalidInputError(
        "this model is sharded by tensor_parallel and has this rank's weights only; load it without"
        " tensor_parallel to save it"
    )


def layers(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield name, module and style of the decoder's sharded modules.

    Styles are "colwise", "rowwise" and "experts".
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    plan = {name.removeprefix(prefix + "."): style for name, style in model.tp_plan.items()}
    for name, module in decoder.named_modules():
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if style in _SHARDED:
            yield name, module, style
        elif style == "moe_tp_experts":
            yield name, module, "experts"


class _OddLayerError(Exception):
    """A layer is not as the plan assumes; the message continues the layer's name."""


def _shard_linear(module: Any, style: str, comm: Comm) -> None:
    if type(module) not in (nn.Linear, Fp8Linear):
        raise _OddLayerError(
            f"is a {type(module).__name__}, and tensor_parallel needs plain linear layers; remove"
            " adapters"
        )
    bias: nn.Parameter | None = module.bias
    if style == "colwise":
        module.weight = _part(module.weight, 0, comm)
        if isinstance(module, Fp8Linear):
            module.scale = _part(module.scale, 0, comm).data
        bias = None if bias is None else _part(bias, 0, comm)
    else:
        module.weight = _part(module.weight, 1, comm)
        # Added once, although the results of all ranks are summed.
        bias = bias if comm.tp_rank == 0 else None
        module.register_forward_hook(sums.summing(comm))
    module.register_parameter("bias", bias)
    module.out_features, module.in_features = module.weight.shape


def _shard_experts(module: nn.Module, comm: Comm) -> None:
    """Shard all experts of a layer.

    `gate_up_proj` is `[experts, 2 x width, hidden]`, `down_proj` `[experts, hidden, width]`.
    """
    weights = dict(module.named_parameters(recurse=False))
    if set(weights) != {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", False):
        raise _OddLayerError("has experts with a weight layout that tensor_parallel does not know")
    up, down = weights["gate_up_proj"], weights["down_proj"]
    width = down.shape[2]
    if up.shape[1] != 2 * width or width % comm.tp_size:
        raise _OddLayerError(
            f"has experts of width {width}, which does not divide by {comm.tp_size}"
        )
    halves: list[Tensor] = [_part(half, 1, comm) for half in up.chunk(2, 1)]
    module.register_parameter(
        "gate_up_proj", nn.Parameter(torch.cat(halves, 1), requires_grad=up.requires_grad)
    )
    module.register_parameter("down_proj", _part(down, 2, comm))
    module.register_forward_hook(sums.summing(comm))


def _part(weight: Tensor, dim: int, comm: Comm) -> nn.Parameter:
    """Return a copy of this rank's part of a weight, so that the whole can be freed."""
    part = weight.detach().chunk(comm.tp_size, dim)[comm.tp_rank]
    return nn.Parameter(
        part.clone(memory_format=torch.contiguous_format), requires_grad=weight.requires_grad
    )
