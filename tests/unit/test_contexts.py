"""Contexts: several at once, extended ones, special tokens; generating never changes one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from star_attention import StarLLM
from star_attention.errors import ContextLengthError, TokenError
from star_attention.hf.loading.load import load_tokenizer
from tests.engines import (
    BUNDLED,
    CONTEXT,
    VARIED,
    assert_same_kv,
    bundled_tokenizer,
    engine,
    ids,
    stored,
    text_model,
    tiny,
)
from tests.families import build
from tests.tiers import in_turn

SETTINGS: list[dict[str, Any]] = [dict(method="dense"), dict(block_size=16, anchor_size=10)]


@pytest.mark.parametrize(
    ("name", "settings"),
    in_turn(2, [*VARIED, "longcat_flash", "jetmoe", "diffllama", "gpt2"], SETTINGS),
    ids=str,
)
def test_contexts_encoded_together_equal_single_ones(name: str, settings: dict[str, Any]) -> None:
    """Equal lengths form a batch, also in layers that expand compressed KV, which failed once."""
    star = engine(name, tokens_per_forward=70, **settings)
    texts = [ids(CONTEXT, seed=1), ids(40, seed=2), ids(CONTEXT, seed=3), ids(CONTEXT, seed=4)]
    contexts = star.encode(texts)
    assert [len(context) for context in contexts] == [101, 40, 101, 101]
    for text, together in zip(texts, contexts, strict=True):
        alone = star.encode(text)
        assert together.token_ids.tolist() == text
        assert together.plan == alone.plan
        assert_same_kv(together, alone)
        replies = [
            star.generate(c, [5, 6, 7], max_new_tokens=5, return_logits=True)
            for c in (together, alone)
        ]
        assert replies[0].token_ids == replies[1].token_ids
        torch.testing.assert_close(replies[0].logits, replies[1].logits, atol=1e-4, rtol=1e-4)


def test_equal_lengths_share_forwards() -> None:
    star = engine("llama", block_size=16, tokens_per_forward=64)
    forwards: list[int] = []
    handle = (
        tiny("llama")
        .get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    )
    try:
        star.encode([ids(32, seed=seed) for seed in range(3)])
        assert forwards == [3, 3]
        forwards.clear()
        # At most tokens_per_forward at a time.
        star.encode([ids(32, seed=seed) for seed in range(6)])
        assert forwards == [4, 4, 2]
    finally:
        handle.remove()


@pytest.mark.parametrize("content", [[], "", torch.tensor([], dtype=torch.int64), [[]], [[5], []]])
def test_an_empty_context_is_refused(content: Any) -> None:
    with pytest.raises(TokenError, match="empty"):
        engine("llama", bundled_tokenizer()).encode(content)


def test_ids_may_have_any_shape_with_one_row() -> None:
    star, expected = engine("llama", block_size=16), ids(40)
    array = torch.tensor(expected).numpy()
    for content in (
        expected,
        tuple(expected),
        torch.tensor(expected),
        torch.tensor([expected]),
        array,
        list(array),
    ):
        assert star.encode(content).token_ids.tolist() == expected
    two = star.encode(torch.tensor([expected, expected[::-1]]))
    assert [context.token_ids.tolist() for context in two] == [expected, expected[::-1]]


# Tokens of context, extension, block and anchor: a short last block, a boundary, less than the
# anchor, within one block, one token.
EXTENSIONS = [
    (37, 30, 16, 10),
    (32, 20, 16, 16),
    (6, 40, 16, 10),
    (5, 4, 16, 0),
    (16, 1, 16, 16),
    (15, 1, 16, 16),
]


@pytest.mark.parametrize(("length", "more", "block_size", "anchor_size"), EXTENSIONS)
@pytest.mark.parametrize("name", [*VARIED, "longcat_flash", "diffllama"])
def test_extending_equals_encoding_the_joined_ids(
    name: str, length: int, more: int, block_size: int, anchor_size: int
) -> None:
    # Both use the same pinned length, that of the first context.
    star = engine(
        name,
        block_size=block_size,
        anchor_size=anchor_size,
        reserve_tokens=100,
        tokens_per_forward=40,
    )
    joined = ids(length + more)
    context = star.encode(joined[:length])
    before = stored(context)
    extended = star.extend(context, joined[length:])

    whole_star = engine(
        name, block_size=block_size, anchor_size=anchor_size, reserve_tokens=100 - more
    )
    whole = whole_star.encode(joined)
    assert extended.rope_length == whole.rope_length
    assert extended.plan == whole.plan
    assert extended.token_ids.tolist() == joined
    assert_same_kv(extended, whole)
    query = ids(5, seed=2)
    torch.testing.assert_close(
        star.logits(extended, query), star.logits(whole, query), atol=1e-4, rtol=1e-4
    )

    assert len(context) == length
    for (k_1GLD, v_1GLD), (old_k_1GLD, old_v_1GLD) in zip(stored(context), before, strict=True):
        assert torch.equal(k_1GLD, old_k_1GLD)
        assert torch.equal(v_1GLD, old_v_1GLD)


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_a_dense_context_stays_dense(name: str) -> None:
    star, joined = engine(name, method="dense"), ids(60)
    extended = star.extend(star.extend(star.encode(joined[:20]), joined[20:23]), joined[23:])
    assert extended.plan.is_dense
    assert_same_kv(extended, star.encode(joined))


def test_an_extension_uses_the_sizes_of_the_context() -> None:
    """The sizes are the context's even in an engine with others."""
    joined = ids(60)
    first, other = (
        engine("llama", block_size=16, anchor_size=4),
        engine("llama", block_size=8, anchor_size=8),
    )
    extended = other.extend(first.encode(joined[:30]), joined[30:])
    assert (extended.plan.block_size, extended.plan.anchor_size) == (16, 4)
    assert_same_kv(extended, first.encode(joined))


def test_an_extension_beyond_the_pinned_length_is_refused() -> None:
    star = engine("phi3_longrope", block_size=16, reserve_tokens=20)
    context = star.encode(ids(30))
    with pytest.raises(ContextLengthError, match="pinned to 50; encode the joined text again"):
        star.extend(context, ids(20))


@pytest.mark.parametrize("name", VARIED)
def test_generating_never_changes_a_context(name: str) -> None:
    """After greedy search, sampling, beams, assisted decoding, logits and an abandoned stream."""
    star = engine(name, bundled_tokenizer(), block_size=16, anchor_size=10)
    context = star.encode(ids(CONTEXT))
    before, first = stored(context), star.generate(context, [5, 6], max_new_tokens=6).token_ids
    star.generate(
        context, [[5, 6], [7]], max_new_tokens=3, do_sample=True, num_return_sequences=2, seed=0
    )
    star.generate(context, [[5, 6], [7]], max_new_tokens=3, num_beams=2)
    star.generate(context, [5, 6], max_new_tokens=3, prompt_lookup_num_tokens=2)
    star.logits(context, [5, 6])
    stream = star.stream(context, [5, 6], max_new_tokens=9)
    list(itertools.islice(stream, 2))
    for actual, expected in zip(stored(context), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert star.generate(context, [5, 6], max_new_tokens=6).token_ids == first


# ------------------------------------------------------------------------------------------- text


def with_special_tokens(*, eos: bool) -> StarLLM:
    """A small model with a tokenizer of its own that adds BOS, and EOS if `eos`."""
    tokenizer = load_tokenizer(BUNDLED)
    specials = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>" if eos else "<bos> $A", special_tokens=specials
    )
    return StarLLM(text_model(), tokenizer)


TEXT = "A letter lies unopened on the desk.\n"


@pytest.mark.parametrize("eos", [False, True])
def test_a_text_context_begins_with_bos_once_and_ends_without_eos(eos: bool) -> None:
    star = with_special_tokens(eos=eos)
    tokenizer = star.tokenizer
    plain = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert (tokenizer(TEXT).input_ids[-1] == tokenizer.eos_token_id) == eos
    assert star.encode(TEXT).token_ids.tolist() == [tokenizer.bos_token_id, *plain]
    assert star.encode("<bos>" + TEXT).token_ids.tolist() == [tokenizer.bos_token_id, *plain]


def test_a_text_query_gets_no_special_tokens() -> None:
    star = with_special_tokens(eos=True)
    context = star.encode(TEXT)
    query = "<|q|>What lies on the desk?<|a|>"
    query_ids = star.tokenizer(query, add_special_tokens=False).input_ids
    assert not {star.tokenizer.bos_token_id, star.tokenizer.eos_token_id} & set(query_ids)
    by_text, by_ids = (star.generate(context, q, max_new_tokens=4) for q in (query, query_ids))
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.query_tokens == len(query_ids)


def test_extending_by_text_adds_no_special_tokens() -> None:
    star = with_special_tokens(eos=True)
    extended = star.extend(star.encode(TEXT), TEXT)
    plain = star.tokenizer(TEXT, add_special_tokens=False).input_ids
    assert extended.token_ids.tolist() == [star.tokenizer.bos_token_id, *plain, *plain]


def test_several_texts() -> None:
    star = with_special_tokens(eos=False)
    contexts = star.encode([TEXT, TEXT * 2])
    assert [c.token_ids.tolist() for c in contexts] == [
        star.encode(t).token_ids.tolist() for t in (TEXT, TEXT * 2)
    ]


def test_the_statistics_of_an_extended_context_cover_all_of_it(tmp_path: Path) -> None:
    """Forbids figures of the last extension alone."""
    star = engine("llama", block_size=16)
    context = star.encode(ids(CONTEXT))
    longer = star.extend(star.extend(context, [5, 6]), [7])
    assert longer.encode_s > context.encode_s > 0
    [before], [after] = context.stats, longer.stats
    assert after.busy_s == pytest.approx(longer.encode_s)
    assert after.busy_s > before.busy_s
    longer.save(tmp_path / "longer.star")
    loaded = star.load_context(tmp_path / "longer.star")
    assert loaded.encode_s == longer.encode_s
    again = star.extend(loaded, [8])
    assert again.encode_s > longer.encode_s
    # A file does not say how the time was spent.
    assert [rank.busy_s for rank in again.stats] == [None]


def test_extend_keeps_the_contexts_own_method() -> None:
    """Forbids labelling a dense context with the method of the engine that extends it."""
    model = build("llama")
    dense = StarLLM(model, method="dense").encode(ids(CONTEXT))
    longer = StarLLM(model, block_size=16).extend(dense, [5, 6, 7])
    assert longer.method == "dense"
    assert longer.plan.is_dense
