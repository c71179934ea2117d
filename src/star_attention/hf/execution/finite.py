"""Notices a model that computes NaN or infinity in place of numbers.

Both spread to every later token, so that the last token of a context and the first of an answer
tell. Without this, such a model answers with whatever token comes first.

Axes: R rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from star_attention.errors import NonFiniteError
from star_attention.hf.execution.handle import ModelHandle
from star_attention.storage.kv import ContextKV


def problem_in(handle: ModelHandle, stores: Sequence[ContextKV]) -> NonFiniteError | None:
    """Return the error for contexts that were encoded without numbers; None if all is well.

    Reads the last token of the last layer on this rank. On a GPU it waits for the device, so it
    comes after the measurements, which do.
    """
    for store in stores:
        layers = [layer for layer in store.layers if not layer.is_empty]
        if not layers or not store.segments:
            continue
        stop = store.segments[-1][1]
        if not all(torch.isfinite(part).all() for part in layers[-1].slice(stop - 1, stop)):
            problem = "the model computed NaN or infinity while encoding"
            return NonFiniteError(problem + _why(handle))
    return None


def are_finite(logits_RV: Tensor) -> Tensor:
    """Return True for rows of logits without NaN and plus infinity, bool `[R]`.

    A model, or a processor of logits, may set some to minus infinity.
    """
    # NaN is the highest of all, and below nothing.
    return logits_RV.amax(-1) < math.inf


def check(handle: ModelHandle, finite: Sequence[int]) -> None:
    """Check rows of the first logits of an answer.

    Args:
        handle: the model.
        finite: the values of `are_finite`.

    Raises:
        NonFiniteError: for a row without.
    """
    if not all(finite):
        raise NonFiniteError(f"the model's logits are NaN or infinite{_why(handle)}")


class FiniteCheck(LogitsProcessor):
    """Checks every step of transformers' own loops, which wait for the device anyway."""

    def __init__(self, handle: ModelHandle) -> None:
        self._handle = handle

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check(self._handle, are_finite(scores).tolist())
        return scores


def _why(handle: ModelHandle) -> str:
    """Say where NaN or infinity may come from, and what to do about it."""
    weight = _first_without_numbers(handle)
    if weight is not None:
        remedy = "copy or download the model again"
        if handle.dtype == torch.float16:
            remedy = f"load it in bfloat16 or float32 (dtype), or {remedy}"
        return f": its weight {weight} has such values in {_name(handle.dtype)}; {remedy}"
    if handle.dtype == torch.float16:
        return (
            " in float16: its weights are finite, so it computes numbers beyond float16's 65,504;"
            ' load it in bfloat16 or float32 (dtype="bfloat16", --dtype bfloat16)'
        )
    return (
        f" in {_name(handle.dtype)}, though its weights are finite; try another precision (dtype),"
        " or check its config.json and what changes it (adapters, quantization, --rope-scaling)"
    )


def _first_without_numbers(handle: ModelHandle) -> str | None:
    """Return the name of a weight with NaN or infinity; None if there is none that can be seen."""
    for name, weight in handle.model.named_parameters():
        # Quantized weights may not be numbers that can be looked at.
        with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                return str(name)
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
