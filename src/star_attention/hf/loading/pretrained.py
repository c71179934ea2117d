"""Loading a model and its tokenizer on one rank or several, and asking if a model can run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from star_attention.distributed.comm import Comm
from star_attention.errors import InvalidInputError, quote
from star_attention.hf.loading import load, support
from star_attention.hf.loading.tensor_parallel import load_shard


@dataclass(frozen=True)
class Support:
    """The result of `supported`: true or false, with the reasons against.

    Attributes:
        reasons: why the model cannot run, one sentence each; empty if it can.
    """

    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return "supported" if self else "not supported: " + "; ".join(self.reasons)


def supported(model_or_config: Any) -> Support:
    """Say if Star Attention can run a transformers model, and if not, why. Loads no weights.

    Args:
        model_or_config: a model, a PEFT model, a config, or the path or hub id of one.
    """
    if isinstance(model_or_config, (str, os.PathLike)):
        return Support(tuple(load.reasons(model_or_config)))
    return Support(tuple(support.reasons(model_or_config)))


def load_pretrained(
    path: str | os.PathLike[str],
    comm: Comm,
    *,
    tensor_parallel: int,
    dtype: str,
    device: str,
    model_kwargs: dict[str, Any],
    adapter: str | os.PathLike[str] | None = None,
    weights: str | None = None,
) -> tuple[Any, Any]:
    """Load a model, or this rank's shard of it, with its tokenizer. Collective.

    Args:
        path: folder or hub id.
        comm: the ranks.
        tensor_parallel: ranks that share the weights of one model; rank 0's value counts.
        dtype: precision, as for `load.load`.
        device: "auto", "cpu", "cuda" or "cuda:1"; of several ranks each takes its own GPU.
        model_kwargs: for `AutoModelForCausalLM.from_pretrained`.
        adapter: folder or hub id of an adapter to load around the model.
        weights: precision of linear layers, as for `load.load`.

    Raises:
        What any rank raised, on all ranks.
    """
    with comm.collective("startup"):
        tensor_parallel = comm.run_on_rank_0(lambda: _check_divides(tensor_parallel, comm.size))
    if comm.size > 1:
        device = load.device_of_rank(device)
    if tensor_parallel > 1:
        return load_shard(
            path,
            comm,
            tensor_parallel,
            dtype=dtype,
            device=device,
            model_kwargs=model_kwargs,
            adapter=adapter,
            weights=weights,
        )
    loaded: list[tuple[Any, Any]] = []
    failure: Exception | None = None
    try:
        loaded.append(
            load.load(
                path,
                dtype=dtype,
                device=device,
                model_kwargs=model_kwargs,
                adapter=adapter,
                weights=weights,
            )
        )
    except Exception as error:
        failure = error
    with comm.collective("loading the model"):
        comm.raise_if_any_failed(failure)
    return loaded[0]


_KEPT = ("subfolder", "revision", "gguf_file", "rope_scaling")
"""Arguments that a saved context keeps. Leave to run a model's own code is never kept."""


def source_of(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    model_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return how a model was named, as JSON values that also hold in another working folder.

    Args:
        path, adapter, model_kwargs: as for `load_pretrained`.
    """
    source: dict[str, Any] = {"model": _absolute(path)}
    if adapter is not None:
        source["adapter"] = _absolute(adapter)
    if model_kwargs.get("rope_parameters") is not None:
        # The new name of the same settings.
        model_kwargs = {"rope_scaling": model_kwargs["rope_parameters"]} | model_kwargs
    kept = {name: model_kwargs[name] for name in _KEPT if model_kwargs.get(name) is not None}
    return source | {"model_kwargs": json.loads(json.dumps(kept, default=str))}


def _absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of what is here, and a hub id as it is."""
    return os.path.abspath(path) if os.path.exists(path) else os.fspath(path)


def _check_divides(tensor_parallel: Any, size: int) -> int:
    is_int = isinstance(tensor_parallel, int) and not isinstance(tensor_parallel, bool)
    if not is_int or tensor_parallel < 1:
        raise InvalidInputError(
            f"tensor_parallel {quote(tensor_parallel)} is not a number of ranks; give 1, 2, 4, ..."
        )
    if size % tensor_parallel:
        raise InvalidInputError(
            f"tensor_parallel {tensor_parallel} does not divide the number of ranks, {size}; start"
            f" a multiple of {tensor_parallel} processes with torchrun"
        )
    count: int = tensor_parallel
    return count
