"""Tensor parallelism: one host of Star Attention on several devices, each with a share of the heads and of the MLP.

Which layers are cut follows from the model's own plan (`tp_plan` in transformers, the names of Megatron-LM, arXiv 1909.08053):
of a "colwise" layer a rank keeps its share of the outputs, of a "rowwise" one its share of the inputs, and the results of the
latter are summed over the host's ranks. Embeddings and language-model head stay whole on every rank.

transformers' `apply_tensor_parallelism` and torch's `parallelize_module` do the same over torch's default group, whose
collectives wait for a dead rank without looking; here they go through our communicator, and nothing depends on where a
release of transformers keeps its function.
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
from star_attention.hf.loading import identity, load, support

_CUT = ("colwise", "rowwise")
_EXPERTS = ("packed_colwise", "moe_tp_experts")
_WHOLE = (
    "replicated_with_grad_allreduce",
    "embedding_rowwise",
    "colwise_gather_output",
    "rowwise_split_input",
)
"""Styles whose layers give the same result when they are not cut."""
_ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
_WHOLE_WIDTH = ("activation_sparsity_pattern",)
"""Fields of configs whose MLP looks at all of its width at once (Gemma 3n)."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a cut model remembers: who has the other shares, and what the whole model was."""

    comm: Comm
    identity: dict[str, Any]


_SHARES: weakref.WeakKeyDictionary[nn.Module, Share] = weakref.WeakKeyDictionary()


def share(model: Any) -> Share | None:
    """What is known of a model that was cut, None for a whole one."""
    model = support.unwrap(model)
    return _SHARES.get(model) if isinstance(model, nn.Module) else None


def reasons(config: Any, tensor_parallel: int) -> list[str]:
    """Why the model of a config cannot be shared out to so many ranks; empty where it can."""
    text = config.get_text_config(decoder=True)
    quantized = any(getattr(one, "quantization_config", None) is not None for one in (config, text))
    config = text
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    attention = {name.rpartition(".")[2]: style for name, style in plan.items()}
    odd = sorted({style for style in plan.values() if style not in (*_CUT, *_EXPERTS, *_WHOLE)})
    found = []
    if not plan:
        found.append(f"transformers has no tensor-parallel plan for {config.model_type}")
    elif odd:
        found.append(
            f"its tensor-parallel plan has layers of the kinds {', '.join(odd)}, which are not implemented"
        )
    elif any(attention.get(name) != style for name, style in _ATTENTION.items()):
        found.append("its tensor-parallel plan does not share out the attention heads")
    if any(getattr(config, field, None) is not None for field in _WHOLE_WIDTH):
        found.append("its MLP looks at all of its width at once")
    if quantized:
        found.append("its weights are quantized")
    for what in (
        "num_attention_heads",
        "num_key_value_heads",
        "num_global_key_value_heads",
        "intermediate_size",
    ):
        for size in sorted(
            {number for number in _numbers(config, what) if number % tensor_parallel}
        ):
            found.append(f"its {what} {size} does not divide by tensor_parallel {tensor_parallel}")
    return found


def check(config: Any, tensor_parallel: int) -> None:
    """Raises `UnsupportedModelError` with the reasons why the model of a config cannot be shared out to so many ranks."""
    found = reasons(config, tensor_parallel) if tensor_parallel > 1 else []
    if found:
        raise UnsupportedModelError(
            f"{config.model_type} with tensor_parallel {tensor_parallel}", found
        )


def _numbers(config: Any, what: str) -> list[int]:
    """A size of all layers, which may differ between them."""
    found: list[int] = []
    for one in (config, *(getattr(config, "per_layer_config", None) or ())):
        with suppress(
            RuntimeError
        ):  # (a config whose layers differ refuses to name one value for all of them)
            value = getattr(one, what, None)
            found += (
                [value]
                if isinstance(value, int)
                else [n for n in value or () if isinstance(n, int)]
            )
    return found


def load_share(
    path: str | os.PathLike[str],
    comm: Comm,
    tensor_parallel: int,
    *,
    dtype: str,
    device: str,
    model_kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    """This rank's share of a model in evaluation mode, on `device`, and the tokenizer. Collective.

    Each rank reads the whole checkpoint into the host's memory; those that share a model do so one after the other.

    Raises what `load.load` does, `UnsupportedModelError` for models that cannot be shared out.
    """
    with comm.collective("the start"):
        mesh = comm.on(torch.device(load.pick_device(device)), tensor_parallel)
    loaded: tuple[Any, Any] | None = None
    for turn in range(tensor_parallel):
        failure: Exception | None = None
        if turn == mesh.tp_rank:
            try:
                for word in ("device_map", "quantization_config", "tp_plan", "distributed_config"):
                    if word in model_kwargs:
                        raise InvalidInputError(
                            f"tensor_parallel {tensor_parallel} does not go with {word} in model_kwargs"
                        )
                check(load.load_config(path, **load.for_all_files(model_kwargs)), tensor_parallel)
                loaded = load.load(path, dtype=dtype, device="cpu", model_kwargs=model_kwargs)
                cut(loaded[0], mesh)
                loaded[0].to(load.pick_device(device))
            except Exception as error:
                failure = error
        with comm.collective("loading the model"):
            comm.raise_if_any_failed(failure)
    assert loaded is not None
    return loaded


def cut(model: Any, comm: Comm) -> None:
    """Leave this rank its share of the weights of a loaded model, in place.

    Raises `UnsupportedModelError` where layers are not as the plan takes them to be.
    """
    whole = identity.model_identity(model, model)
    for name, module, style in list(layers(model)):
        try:
            if style == "experts":
                _cut_experts(module, comm)
            else:
                _cut_linear(module, style, comm)
        except _OddLayerError as odd:
            raise UnsupportedModelError(type(model).__name__, [f"{name} {odd}"]) from None
    for module in model.get_decoder().modules():
        if not isinstance(getattr(module, "q_proj", None), nn.Linear):
            continue
        for name, weight in module.named_parameters():
            if weight.dim() > 1 and name.partition(".")[0] not in _ATTENTION:
                raise UnsupportedModelError(
                    type(model).__name__,
                    [f"its attention has weights for each head ({name}) that its plan leaves out"],
                )
    _SHARES[support.unwrap(model)] = Share(comm=comm, identity=whole)
    model.save_pretrained = _refuse_to_save


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InvalidInputError(
        "this model was shared out by tensor_parallel and holds this rank's weights only; save the whole one, loaded without"
        " tensor_parallel"
    )


def layers(model: Any) -> Iterator[tuple[str, Any, str]]:
    """The decoder's modules that are cut, with how: "colwise", "rowwise", or "experts"."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    plan = {name.removeprefix(prefix + "."): style for name, style in model.tp_plan.items()}
    for name, module in decoder.named_modules():
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if style in _CUT:
            yield name, module, style
        elif style == "moe_tp_experts":
            yield name, module, "experts"


class _OddLayerError(Exception):
    """What a layer is not."""


def _cut_linear(module: nn.Module, style: str, comm: Comm) -> None:
    if type(module) is not nn.Linear:
        raise _OddLayerError(
            "is no plain linear layer, which tensor_parallel needs (has it an adapter?)"
        )
    bias: nn.Parameter | None = module.bias
    if style == "colwise":
        module.weight = _part(module.weight, 0, comm)
        bias = None if bias is None else _part(bias, 0, comm)
    else:
        module.weight = _part(module.weight, 1, comm)
        bias = bias if comm.tp_rank == 0 else None  # added once
        module.register_forward_hook(_summed(comm))
    module.register_parameter("bias", bias)
    module.out_features, module.in_features = module.weight.shape


def _cut_experts(module: nn.Module, comm: Comm) -> None:
    """All experts of a layer: `gate_up_proj` is `[experts, 2 x width, hidden]`, `down_proj` `[experts, hidden, width]`."""
    weights = dict(module.named_parameters(recurse=False))
    if set(weights) != {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", False):
        raise _OddLayerError(
            "has experts whose weights lie in another way than tensor_parallel knows"
        )
    up, down = weights["gate_up_proj"], weights["down_proj"]
    width = down.shape[2]
    if up.shape[1] != 2 * width or width % comm.tp_size:
        raise _OddLayerError(f"has experts of width {width}, which do not divide by {comm.tp_size}")
    halves: list[Tensor] = [_part(half, 1, comm) for half in up.chunk(2, 1)]
    module.register_parameter(
        "gate_up_proj", nn.Parameter(torch.cat(halves, 1), requires_grad=up.requires_grad)
    )
    module.register_parameter("down_proj", _part(down, 2, comm))
    module.register_forward_hook(_summed(comm))


def _part(weight: Tensor, dim: int, comm: Comm) -> nn.Parameter:
    part = weight.detach().chunk(comm.tp_size, dim)[comm.tp_rank]
    return nn.Parameter(
        part.clone(memory_format=torch.contiguous_format), requires_grad=weight.requires_grad
    )


def _summed(comm: Comm) -> Callable[..., Tensor]:
    return lambda module, inputs, output: comm.tp_sum(output)
