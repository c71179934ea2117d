"""The model of a saved context: as its file names it, and whether another one may fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from star_attention.cli.model_options import MODEL_VARIABLE, ModelOptions, json_object
from star_attention.errors import ContextMismatchError, InvalidInputError, ModelNotFoundError
from star_attention.hf.loading import files
from star_attention.hf.loading.weight_formats import WEIGHTS

_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Fields of a config.json that are compared before a model is loaded."""


def named_by(header: dict[str, Any], path: str, model: ModelOptions) -> ModelOptions:
    """Complete the options by what a saved context says of its model.

    Args:
        header: The context's header.
        path: Its file.
        model: The options; those that are given win.

    Raises:
        InvalidInputError: If neither names a model.
        ModelNotFoundError: If the model that the file names is not here.
    """
    if model.dtype == "auto":
        model = replace(model, dtype=header["identity"]["dtype"].removeprefix("torch."))
    if model.weights is None:
        model = replace(model, weights=_weights(header))
    source = header.get("source") or {}
    name = model.model or source.get("model") or os.environ.get(MODEL_VARIABLE)
    if not name:
        raise InvalidInputError(f"{path} does not name its model; give it with -m")
    if model.model or not source:
        return replace(model, model=name)
    kwargs = source.get("model_kwargs", {}) | json_object(model.model_kwargs, "--model-kwargs")
    own = replace(
        model,
        model=name,
        adapter=model.adapter or source.get("adapter"),
        rope_scaling=model.rope_scaling or kwargs.pop("rope_scaling", None),
        model_kwargs=json.dumps(kwargs),
    )
    location = {key: own.kwargs()[key] for key in files.LOCATION if key in own.kwargs()}
    try:
        files.locate(own.model, location, own.adapter)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{path} was encoded with the model {name}, which cannot be loaded: {error}; if it is"
            " elsewhere now, give it with -m"
        ) from error
    return own


def _weights(header: dict[str, Any]) -> str | None:
    """Return the precision of a context's linear layers; None for that of the files."""
    weights = header["identity"].get("linear_weights")
    return weights if weights in WEIGHTS else None


def check_fits(header: dict[str, Any], path: str, model: ModelOptions) -> None:
    """Check what can be checked of a context's model without loading it.

    Raises:
        ContextMismatchError: If its precision or architecture differs from the context's.
    """
    identity = header["identity"]
    dtype = identity["dtype"].removeprefix("torch.")
    if model.dtype != dtype:
        raise ContextMismatchError(
            "dtype",
            f"{path} does not fit: it differs in dtype: {dtype} in the context, {model.dtype} as"
            " asked for; leave out --dtype, or encode the context again",
        )
    weights = _weights(header)
    if model.weights != weights:
        raise ContextMismatchError(
            "linear_weights",
            f"{path} does not fit: its linear layers were {weights or 'as in the files'},"
            f" {model.weights} is asked for; leave out --weights, or encode the context again",
        )
    kwargs = model.kwargs()
    location = {key: kwargs[key] for key in files.LOCATION if key in kwargs}
    config = files.locate(model.model, location, model.adapter).config or {}
    text = config.get("text_config")
    own = text if isinstance(text, dict) else config
    saved = identity["config"]
    for field in _ARCHITECTURE:
        if (
            field in own
            and field in saved
            and own[field] is not None
            and own[field] != saved[field]
        ):
            raise ContextMismatchError(
                f"config.{field}",
                f"{path} does not fit: it differs in config.{field}: {saved[field]} in the context,"
                f" {own[field]} in this model; load the model that encoded it, or encode the"
                " context again",
            )
