"""`star-attention info`: what a saved context or a model is, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from star_attention.cli.formatting import format_bytes
from star_attention.cli.model_options import LocationOptions
from star_attention.cli.options import Json

_LABELS = {
    "file_bytes": "files",
    "weight_bytes": "weights as loaded",
    "fp8_weight_bytes": "weights in fp8",
    "kv_bytes_per_token": "keys and values per token",
}
"""What sizes in bytes are called."""

_GGUF_MAGIC = b"GGUF"


def info(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE|MODEL",
            help="A saved context, or a model: folder, GGUF file, adapter or hub id.",
            show_default=False,
        ),
    ],
    location: LocationOptions,
    as_json: Json = False,
) -> None:
    """Show what a saved context or a model is, and whether the model can run.

    Reads the header of a saved context, and a model's config.json and the names of its files, but
    no weights.

    Example: star-attention info models/needle-17m
    """
    from star_attention.cli import info_facts

    facts = (
        info_facts.of_context(target)
        if _is_context(target)
        else info_facts.of_model(target, location.kwargs())
    )
    print(json.dumps(facts) if as_json else _as_text(facts))


def _is_context(target: str) -> bool:
    """True if a saved context, rather than a model, is meant."""
    path = Path(target)
    if path.is_dir():
        return (path / "index.json").is_file() and not (path / "config.json").is_file()
    if not path.is_file():
        return path.suffix == ".star"
    with open(path, "rb") as file:
        return file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC and path.suffix.lower() != ".gguf"


def _as_text(facts: dict[str, Any]) -> str:
    rows = [
        (_LABELS.get(name, name.replace("_", " ")), _shown(name, value))
        for name, value in facts.items()
        if value is not None
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label.ljust(width)}  {text}" for label, text in rows if text)


def _shown(name: str, value: Any) -> str:
    """Return a fact for people."""
    if name in _LABELS:
        return format_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "reasons":
        return "; ".join(value)
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
