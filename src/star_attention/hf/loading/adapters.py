"""Loading a PEFT adapter around a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from star_attention.errors import MissingPackageError, ModelNotFoundError, first_line

_EMBEDDING = "embed_tokens.weight"
# A weight for each of hundreds of layers may be named in one line.
_SHOWN_CHARACTERS = 300


def attach(model: Any, adapter: str, tokenizer: Any) -> Any:
    """Load an adapter around a model.

    Args:
        model: the base model.
        adapter: folder or hub id of the adapter.
        tokenizer: the tokenizer that goes with it; None without one.

    Returns:
        The PEFT model.

    Raises:
        ModelNotFoundError: the adapter cannot be read, or belongs to another model.
        MissingPackageError: peft cannot be imported.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingPackageError(
            f"{adapter} is an adapter, and peft cannot be imported ({first_line(error)});"
            ' run: pip install "star-attention[peft]"'
        ) from error
    try:
        shapes = _shapes(adapter)
        _grow_embeddings(model, shapes, tokenizer)
        with warnings.catch_warnings():
            # Layers without weights would do nothing, or something random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            outer = PeftModel.from_pretrained(model, adapter)
        loaded = get_peft_model_state_dict(outer, save_embedding_layers=bool(shapes))
        unused = sorted(shapes.keys() - loaded.keys())
    except Exception as error:
        # peft's errors are of any type.
        message = " ".join(str(error).split())
        raise _unfit(model, adapter, message[:_SHOWN_CHARACTERS].rstrip(".")) from error
    if unused:
        raise _unfit(model, adapter, f"the model has no place for {unused[0]}")
    return outer


def _unfit(model: Any, adapter: str, problem: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the adapter at {adapter} could not be loaded around {model.config.name_or_path}:"
        f" {problem}; check that it was trained for this model"
    )


def _shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's weights by name; {} if they cannot be read without peft."""
    path = Path(adapter) / "adapter_model.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _grow_embeddings(model: Any, shapes: dict[str, tuple[int, ...]], tokenizer: Any) -> None:
    """Add the rows for tokens that an adapter's own tokenizer adds, to be filled by the adapter."""
    stored = [shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDING)]
    rows = model.get_input_embeddings().weight.shape[0]
    if stored and stored[0] > rows:
        rows = stored[0]
        model.resize_token_embeddings(rows)
    if shapes and tokenizer is not None and len(tokenizer) > rows:
        raise ValueError(
            f"its tokenizer has {len(tokenizer):,} tokens, the model {rows:,}, and the adapter"
            " brings no embeddings for the others"
        )
