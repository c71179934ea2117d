"""Helpers for tests of saved contexts."""

from __future__ import annotations

from pathlib import Path

from star_attention import EncodedContext, StarLLM
from tests.engines import CONTEXT, QUERY, engine, ids, stored

BLOCK = 20


def small_context() -> EncodedContext:
    """A context of a tiny model."""
    return engine("llama", block_size=BLOCK).encode(ids(CONTEXT))


def answer(star: StarLLM, context: EncodedContext) -> list[int]:
    """A short answer's token ids."""
    tokens: list[int] = star.generate(context, ids(QUERY, seed=2), max_new_tokens=6).token_ids
    return tokens


def load_fully(path: Path, star: StarLLM | None = None) -> EncodedContext:
    """Load a context and read every layer."""
    loaded: EncodedContext = (star or engine("llama")).load_context(path)
    stored(loaded)
    return loaded
