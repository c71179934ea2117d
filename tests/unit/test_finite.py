"""A model that computes NaN or infinity is refused; it would answer with whatever comes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import NonFiniteError
from tests.engines import CONTEXT, ids
from tests.families import build

NAN, INF = float("nan"), float("inf")
SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10)


def not_finite(*fragments: str, call: Callable[[], Any]) -> None:
    """Assert that a call is refused with every fragment in the message."""
    with pytest.raises(NonFiniteError) as raised:
        call()
    assert isinstance(raised.value, ArithmeticError)
    for fragment in fragments:
        assert fragment in str(raised.value)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    """A model of the test's own, in which it may plant what it likes."""
    return build("llama").to(dtype)


@torch.no_grad()
def with_large_activations(dtype: torch.dtype) -> Any:
    """A model of ordinary weights whose second layer adds up to more than float16 holds."""
    model = llama(dtype)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.mul_(300)
        layer.mlp.down_proj.weight.mul_(3000)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    return model


@pytest.mark.parametrize("method", ["star", "dense", "streaming_llm"])
@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
def test_activations_beyond_float16_are_named(method: str, kv_dtype: str | None) -> None:
    settings: dict[str, Any] = dict(method=method, kv_dtype=kv_dtype)
    if method == "star":
        settings |= SIZES
    star = StarLLM(with_large_activations(torch.float16), **settings)
    not_finite(
        "the model computed NaN or infinity while encoding in float16: its weights are finite, so"
        " it computes numbers beyond float16's 65,504; load it in bfloat16 or float32",
        call=lambda: star.encode(ids(CONTEXT)),
    )
    # The remedy helps.
    star = StarLLM(with_large_activations(torch.bfloat16), **settings)
    assert star.generate(star.encode(ids(CONTEXT)), [5], max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("dtype", "value", "remedy"),
    [
        (torch.float32, NAN, "in float32; copy or download the model again"),
        (torch.bfloat16, INF, "in bfloat16; copy or download the model again"),
        (torch.float16, INF, "in float16; load it in bfloat16 or float32 (dtype), or copy or"),
    ],
)
def test_a_weight_without_numbers_is_named(dtype: torch.dtype, value: float, remedy: str) -> None:
    model = llama(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 4] = value
        model.model.layers[0].mlp.down_proj.weight[5, 6] = value
    star = StarLLM(model, **SIZES)
    weight = "its weight model.layers.0.mlp.down_proj.weight has such values"
    not_finite(weight, remedy, call=lambda: star.encode(ids(CONTEXT)))


def answer(star: StarLLM, context: EncodedContext, query: Any, **options: Any) -> Any:
    return star.generate(context, query, max_new_tokens=3, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(do_sample=True),
        dict(do_sample=True, seed=3, top_p=0.9),
        dict(num_return_sequences=2, do_sample=True, seed=1),
        dict(num_beams=2),
        dict(prompt_lookup_num_tokens=2),
        dict(logprobs=2),
    ],
    ids=str,
)
def test_an_answer_of_nan_is_refused(options: dict[str, Any]) -> None:
    """The query's own token is at fault, so that the context is sound, and stays so."""
    model = llama()
    bad = 77
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = NAN
    star = StarLLM(model, **SIZES)
    context = star.encode([token for token in ids(CONTEXT) if token != bad])
    before = answer(star, context, [5]).token_ids
    message = "the model's logits are NaN or infinite: its weight model.embed_tokens.weight has"
    not_finite(message, call=lambda: answer(star, context, [5, bad, 6], **options))
    if options.get("prompt_lookup_num_tokens") is None:
        queries = [[5], [5, bad, 6]]
        not_finite(message, call=lambda: answer(star, context, queries, **options))
    assert answer(star, context, [5]).token_ids == before
    not_finite("while encoding", call=lambda: star.extend(context, [9, bad]))
    assert len(star.extend(context, [9])) == len(context) + 1


def test_a_stream_of_nan_is_refused(tmp_path: Path) -> None:
    from tests.engines import bundled_tokenizer, text_model

    star = StarLLM(text_model(), bundled_tokenizer(), block_size=32)
    context = star.encode("The hill is tall. " * 20)
    context.save(tmp_path / "hill.star")
    norm = text_model().model.norm.weight
    sound = norm.detach().clone()
    try:
        with torch.no_grad():
            norm[0] = INF
        broken = StarLLM(text_model(), bundled_tokenizer(), block_size=32)
        # The last norm comes after all keys and values.
        context = broken.encode("The hill is tall. " * 20)
        stream = broken.stream(context, "A dog", max_new_tokens=5)
        not_finite("logits are NaN", "model.norm.weight", call=lambda: list(stream))
    finally:
        with torch.no_grad():
            norm.copy_(sound)


def test_logits_of_minus_infinity_are_sound() -> None:
    """Forbids refusing models that rule tokens out."""
    model = llama()
    star = StarLLM(model, **SIZES)
    context = star.encode(ids(CONTEXT))
    first = answer(star, context, [5]).token_ids[0]

    def rule_out(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([first]), -INF)

    hook = model.lm_head.register_forward_hook(rule_out)
    try:
        for options in ({}, dict(num_beams=2), dict(do_sample=True, seed=1)):
            assert first not in answer(star, context, [5], **options).token_ids
    finally:
        hook.remove()
