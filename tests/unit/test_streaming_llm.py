"""StreamingLLM against an explicit mask: tokens see sinks and a window; nothing else is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from star_attention import StarLLM
from star_attention.errors import ContextMismatchError, InvalidInputError
from star_attention.planning import pairs
from star_attention.planning.plan import BlockPlan
from tests.engines import engine, ids, tiny
from tests.model_oracle import cached, cached_kv, eager_attention, layer_masks


def mask(total: int, sinks: int, window: int, own: int | None = None) -> torch.Tensor:
    """Return `j <= i and (j < sinks or i - j < window)`, within the layer's own window."""
    i, j = torch.arange(total)[:, None], torch.arange(total)[None]
    keep = (j <= i) & ((j < sinks) | (i - j < window))
    return keep if own is None else keep & (i - j < own)


@torch.no_grad()
def oracle(
    model: Any, tokens: list[int], sinks: int, window: int
) -> tuple[torch.Tensor, list[Any]]:
    cache = DynamicCache()
    masks = layer_masks(model, lambda own: mask(len(tokens), sinks, window, own))
    with eager_attention(model):
        out = model(
            torch.tensor([tokens]), attention_mask=masks, use_cache=True, **cached(model, cache)
        )
    return out.logits[0], cached_kv(cache)


FAMILIES = ["llama", "gemma2", "gpt_oss", "gemma3n", "deepseek_v3", "qwen3_moe"]


@pytest.mark.parametrize(("sinks", "window"), [(4, 30), (0, 24), (7, 7), (12, 90), (3, 200)])
@pytest.mark.parametrize("name", FAMILIES)
def test_against_the_mask(name: str, sinks: int, window: int) -> None:
    """Compare stored keys and values, and logits of a query with an answer beyond the window."""
    context, query, steps = 101, 5, 12
    star = engine(
        name, method="streaming_llm", block_size=window, anchor_size=sinks, tokens_per_forward=23
    )
    tokens = ids(context + query)
    encoded = star.encode(tokens[:context])
    reply = star.generate(
        encoded, tokens[context:], max_new_tokens=steps, ignore_eos=True, return_logits=True
    )
    logits, kv = oracle(star.model, [*tokens, *reply.token_ids], sinks, window)
    expected = logits[context + query - 1 : -1]
    torch.testing.assert_close(
        reply.logits, expected, atol=2e-4 * max(1.0, expected.abs().max().item()), rtol=0
    )
    assert reply.token_ids == expected.argmax(-1).tolist()
    stored = [*range(min(sinks, context)), *range(max(sinks, context - window), context)]
    pairs = [layer.pair() for layer in encoded.kv.layers if not layer.is_empty]
    for pair, whole in zip(pairs, kv, strict=True):
        for a, b in zip(pair, whole, strict=True):
            torch.testing.assert_close(a, b[:, :, stored], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forward", [1, 10, 50, 200])
def test_the_size_of_forwards_does_not_matter(forward: int) -> None:
    sizes: dict[str, Any] = dict(method="streaming_llm", block_size=20, anchor_size=3)
    first = engine("llama", tokens_per_forward=7, **sizes)
    other = engine("llama", tokens_per_forward=forward, **sizes)
    a, b = (star.logits(star.encode(ids(90)), ids(6, seed=2)) for star in (first, other))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_window_over_everything_is_dense() -> None:
    dense = engine("llama", method="dense", tokens_per_forward=16)
    wide = engine("llama", method="streaming_llm", block_size=1000, tokens_per_forward=16)
    a, b = (star.logits(star.encode(ids(90)), ids(6, seed=2)) for star in (dense, wide))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_sizes_and_memory() -> None:
    """Four sinks by default; the stored keys do not grow with the context."""
    star = engine("llama", method="streaming_llm", block_size=32)
    short, long = (star.encode(ids(tokens)) for tokens in (100, 400))
    assert short.plan.anchor_size == 4
    assert short.nbytes == long.nbytes == 36 * star.encode(ids(1)).nbytes
    assert long.layout == (((0, 4), (368, 400)),)
    assert repr(long) == "EncodedContext(streaming_llm, 400 tokens, window 32, 4 sinks)"


@pytest.mark.parametrize("kv_format", [dict(), dict(kv_dtype="fp8"), dict(kv_device="cpu")])
def test_saved_and_loaded(tmp_path: Path, kv_format: dict[str, str]) -> None:
    star = engine("llama", method="streaming_llm", block_size=20, anchor_size=3, **kv_format)
    context = star.encode(ids(90))
    context.save(tmp_path / "a.star")
    loaded = star.load_context(tmp_path / "a.star")
    assert loaded.kv.visible == context.kv.visible
    options: dict[str, Any] = dict(max_new_tokens=30, ignore_eos=True)
    assert (
        star.generate(loaded, ids(6), **options).token_ids
        == star.generate(context, ids(6), **options).token_ids
    )


def test_batches_beams_and_streams() -> None:
    star = engine(
        "llama", method="streaming_llm", block_size=20, anchor_size=3, tokens_per_forward=32
    )
    first, second = star.encode([ids(90), ids(90, seed=3)])
    queries = [ids(6, seed=4), ids(9, seed=5)]
    options: dict[str, Any] = dict(max_new_tokens=25, ignore_eos=True)
    alone = [star.generate(first, query, **options).token_ids for query in queries]
    assert [reply.token_ids for reply in star.generate(first, queries, **options)] == alone
    assert (
        star.generate(second, queries[0], **options).token_ids
        == star.generate(star.encode(ids(90, seed=3)), queries[0], **options).token_ids
    )
    assert len(star.generate(first, queries[0], num_beams=3, **options).token_ids) == 25


def test_refusals(tmp_path: Path) -> None:
    star = engine("llama", method="streaming_llm", block_size=20)
    context = star.encode(ids(50))
    with pytest.raises(InvalidInputError, match="a streaming_llm context cannot be extended"):
        star.extend(context, ids(5))
    context.save(tmp_path / "a.star")
    with pytest.raises(
        ContextMismatchError,
        match="it differs in method: streaming_llm in the context, star in this model",
    ):
        StarLLM(tiny("llama")).load_context(tmp_path / "a.star")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 25), st.none() | st.integers(1, 70))
def test_operations(tokens: int, window: int, sinks: int, own: int | None) -> None:
    """The counted pairs are those of the mask."""
    plan = BlockPlan(
        context_tokens=tokens, block_size=window, anchor_size=min(sinks, window), ranks=1
    )
    assert pairs.streaming_pairs(plan, own) == int(
        mask(tokens, plan.anchor_size, window, own).sum()
    )
