"""Formats of quantized weights, recognized by names: those that transformers would misread.

transformers ignores tensors that a model has no place for, such as the scales of a format that it
does not know, and would load the rest as plain weights. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, ModelNotFoundError, quote
from star_attention.hf.loading.packages import UNKNOWN_METHOD, quantization

WEIGHTS = ("fp8",)
"""Precisions that linear layers may be loaded in, other than that of the model's files."""

_NOT_TAKEN = {
    "exl2": "ExLlamaV2's format",
    "exl3": "ExLlamaV3's format",
    "modelopt": "NVIDIA ModelOpt's format",
}
"""Formats by `quant_method` that transformers cannot load."""

_MLX = (".scales", ".biases")
_SCALES = (
    ".absmax",
    ".input_scale",
    ".qweight",
    ".SCB",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
)
"""Ends of names that only quantized weights have."""

_LONGEST_HEADER = 1 << 27
_REMEDY = "give the original model, a GGUF file of it, or weights quantized for transformers"


def check_name(weights: Any) -> None:
    """Check the name of a precision of linear layers; None is the files' own.

    Raises:
        InvalidInputError: linear layers are not loaded in it.
    """
    if weights not in (None, *WEIGHTS):
        raise InvalidInputError(
            f"weights {quote(weights)} is unknown; choose {', '.join(WEIGHTS)}, or leave it out"
        )


def check(folder: Path, weights: str, config: dict[str, Any]) -> None:
    """Check that weights are in a format that transformers reads as what it is.

    Args:
        folder: the model's folder.
        weights: its file of weights, or their index.
        config: the contents of its config.json.

    Raises:
        ModelNotFoundError: they are quantized in a way that transformers cannot load, or that
            config.json does not name.
    """
    method = quantization(config)
    problem = _NOT_TAKEN.get(method or "")
    if problem is None and method in (None, UNKNOWN_METHOD):
        names = _tensor_names(folder / weights)
        scales = next((name for name in names if name.endswith(_SCALES)), None)
        if all(any(name.endswith(end) for name in names) for end in _MLX):
            problem = "MLX's format"
        elif scales is not None and method is None:
            raise ModelNotFoundError(
                f"the weights at {folder} are quantized (they have {scales}), but config.json does"
                " not say how (quantization_config); copy or download it again, give"
                f" quantization_config in model_kwargs, or {_REMEDY}"
            )
        elif method is not None:
            raise ModelNotFoundError(
                f"config.json at {folder} has a quantization_config without quant_method, so that"
                f" its weights cannot be read; copy or download it again, or {_REMEDY}"
            )
    if problem is not None:
        raise ModelNotFoundError(
            f"the weights at {folder} are quantized in {problem}, which transformers cannot load;"
            f" {_REMEDY}"
        )


def _tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file or an index; [] for others."""
    try:
        if file.suffix == ".json":
            names = json.loads(file.read_bytes()).get("weight_map", {})
        elif file.suffix == ".safetensors":
            with open(file, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                names = json.loads(stream.read(size)) if size <= _LONGEST_HEADER else {}
        else:
            names = {}
    except (OSError, ValueError, AttributeError):
        # Whatever is wrong with the file, its reader says.
        return []
    return [str(name) for name in names]
