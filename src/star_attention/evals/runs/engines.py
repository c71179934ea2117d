"""The engine of a variant: the same model with another method and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from star_attention.engine import StarLLM
from star_attention.evals.runs import ablations
from star_attention.evals.runs.anchors import CONTENTS, POSITIONS
from star_attention.evals.runs.settings import GREEDY
from star_attention.evals.runs.variants import Variant
from star_attention.inputs import Content
from star_attention.planning.windows import ALL
from star_attention.storage.context import EncodedContext


def engine_for(star: StarLLM, variant: Variant, sizes: tuple[int | None, int | None]) -> StarLLM:
    """Return the engine with a variant's method and its block and anchor size in tokens.

    Raises:
        InvalidInputError: For look-back in layers that the model does not have.
    """
    block_size, anchor_size = sizes
    # A second look takes keys that answers alone do not.
    kv_windows = ALL if variant.second_look else star.config.kv_windows
    return star.with_config(
        method=variant.method,
        block_size=block_size,
        anchor_size=anchor_size,
        kv_dtype=variant.kv_dtype or star.config.kv_dtype,
        kv_windows=kv_windows,
        lookback=variant.lookback,
        lookback_layers=variant.lookback_layers,
    )


def encode_all(
    engine: StarLLM,
    variant: Variant,
    contents: list[list[int]],
    continuation: list[int],
    *,
    seed: int,
) -> list[EncodedContext]:
    """Encode several contexts, in batches unless the variant is an ablation.

    Args:
        engine: The variant's engine.
        variant: The variant.
        contents: Token ids of each context.
        continuation: As many token ids as will follow each but one, on which rotary frequencies may
            depend.
        seed: Seed of random anchors.
    """
    if variant.is_ablation:
        return [encode(engine, variant, content, seed=seed) for content in contents]
    settings = GREEDY | {"max_new_tokens": 1}
    return engine.encode(contents, progress=False, query=continuation, settings=settings)


def encode(
    engine: StarLLM,
    variant: Variant,
    content: Content,
    *,
    seed: int,
    template_kwargs: Mapping[str, Any] | None = None,
    answering: Mapping[str, Any] | None = None,
) -> EncodedContext:
    """Encode one context with an engine of `engine_for`.

    Args:
        engine: The variant's engine.
        variant: The variant.
        content: Text, token ids or messages.
        seed: Seed of random anchors.
        template_kwargs: What the chat template reads beside messages.
        answering: Arguments of `StarLLM.generate` for the longest answer on this context, which
            rotary frequencies may depend on.
    """
    # None where there are none, as a text takes no arguments of a template.
    kwargs = dict(template_kwargs or {}) or None
    if not variant.is_ablation:
        settings = dict(answering or {})
        query = settings.pop("query", None)
        return engine.encode(
            content,
            progress=False,
            query=query,
            settings=settings or None,
            chat_template_kwargs=kwargs,
        )
    return ablations.encode(
        engine,
        content,
        anchor=variant.anchor or CONTENTS[0],
        positions=variant.anchor_positions or POSITIONS[0],
        seed=seed,
        template_kwargs=kwargs,
    )
