"""A second look: the tokens that a query attends to most, computed again for its answer alone."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import pytest
import torch

import star_attention
from star_attention import StarLLM
from star_attention.errors import InvalidInputError, OutOfMemoryError
from star_attention.hf.cache.second_look import MassCache
from star_attention.planning.lookback import layer_numbers
from star_attention.planning.pairs import renewed_pairs
from star_attention.planning.plan import BlockPlan
from star_attention.planning.second_look import chosen_tokens
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV
from tests import spelling
from tests.engines import (
    CONTEXT,
    QUERY,
    VARIED,
    bundled_tokenizer,
    engine,
    ids,
    stock_generate,
    stored,
    text_model,
    tiny,
)
from tests.families import FAMILIES, UNUSUAL
from tests.family_configs import WINDOW
from tests.second_look_oracle import attention_mass, second_look_choice, second_look_logits
from tests.tiers import in_turn

STEPS = 4
# Several blocks a forward, then pieces of one. The last block is ragged.
GEOMETRIES: list[dict[str, Any]] = [
    dict(block_size=16, anchor_size=16, tokens_per_forward=40, kv_windows="all"),
    dict(block_size=24, anchor_size=10, tokens_per_forward=9, kv_windows="all")
    | dict(lookback=1, lookback_layers="lower"),
]
TOLERANCE = 1e-4


def assert_close(actual: Any, right: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, right, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "name", in_turn(2, [*FAMILIES, *UNUSUAL], quick=lambda name: name in VARIED)
)
def test_a_look_at_everything_is_the_stock_model(name: str) -> None:
    """Law: with a share of 1 every family answers like stock `generate`; the context stays."""
    star = engine(name, **SIZES)
    context_ids, query_ids = ids(CONTEXT), ids(QUERY, seed=2)
    context = star.encode(context_ids)
    before = stored(context)

    reply = star.generate(
        context,
        query_ids,
        max_new_tokens=STEPS,
        ignore_eos=True,
        return_logits=True,
        second_look=1,
    )

    [stock], stock_1TV = stock_generate(
        tiny(name),
        context_ids + query_ids,
        rope_length=context.rope_length,
        max_new_tokens=STEPS,
        do_sample=False,
    )
    assert reply.token_ids == stock
    assert_close(reply.logits, stock_1TV[0])
    for layer, layer_before in zip(stored(context), before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(layer, layer_before, strict=True))


@pytest.mark.parametrize(
    ("settings", "share"), [*zip(GEOMETRIES, [0.1, 0.6], strict=True)], ids=["star", "look-back"]
)
@pytest.mark.parametrize("name", VARIED)
def test_a_look_at_a_share_is_the_explicit_mask(
    name: str, settings: dict[str, Any], share: float
) -> None:
    """Forbids that an old and a new key of a token both count, or that the wrong ones are new."""
    star = engine(name, **settings)
    context_ids, query_ids = ids(CONTEXT), ids(QUERY, seed=2)
    context = star.encode(context_ids)
    plain = star.generate(context, query_ids, max_new_tokens=1, return_logits=True)

    reply = star.generate(
        context,
        query_ids,
        max_new_tokens=STEPS,
        ignore_eos=True,
        return_logits=True,
        second_look=share,
    )

    all_ids = context_ids + query_ids + reply.token_ids
    law: dict[str, Any] = dict(
        context_len=CONTEXT,
        block_size=settings["block_size"],
        anchor_size=settings["anchor_size"],
        rope_length=context.rope_length,
    )
    if settings.get("lookback"):
        layers = layer_numbers(settings["lookback_layers"], len(context.kv.layers))
        law |= dict(lookback=settings["lookback"], lookback_layers=layers)
    chosen = second_look_choice(tiny(name), all_ids, share, query_len=QUERY, **law)
    right_TV = second_look_logits(tiny(name), all_ids, chosen, **law)[QUERY - 1 : -1]
    assert_close(reply.logits, right_TV)
    assert reply.token_ids == right_TV.argmax(-1).tolist()
    again = star.generate(context, query_ids, max_new_tokens=1, return_logits=True)
    assert torch.equal(again.logits, plain.logits), "the context has changed"


@pytest.mark.parametrize("name", VARIED)
def test_the_choice_is_by_the_models_own_probabilities(name: str) -> None:
    """Forbids a choice by other weights, such as those without a layer's learned sinks."""
    star = engine(name, **GEOMETRIES[0])
    context, query_ids = star.encode(ids(CONTEXT)), ids(QUERY, seed=2)
    handle, device = star.runtime.handle, torch.device("cpu")
    cache = MassCache(context.kv, handle.windows, CONTEXT, context.comm, device)
    # In two forwards, as long queries are.
    for part in (slice(3), slice(3, QUERY)):
        positions_Q = torch.arange(CONTEXT, CONTEXT + QUERY)[part]
        ids_1Q = torch.tensor([query_ids[part]])
        handle.encode(ids_1Q, positions_Q[None], cache, context.rope_length)
    right_L = attention_mass(
        tiny(name),
        ids(CONTEXT) + query_ids,
        context_len=CONTEXT,
        query_len=QUERY,
        block_size=16,
        anchor_size=16,
        rope_length=context.rope_length,
    )
    assert_close(cache.position.mass_K, right_L, 1e-3)


# ------------------------------------------------------------------ answers of every kind

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=4, tokens_per_forward=40, kv_windows="all")
LOOK: dict[str, Any] = dict(second_look=0.3, max_new_tokens=STEPS, ignore_eos=True)


def tokens(star: StarLLM, context: Any, query: Any, **settings: Any) -> Any:
    """Return the token ids of an answer, or of each."""
    replies = star.generate(context, query, **(LOOK | settings))

    def of(reply: Any) -> Any:
        return [of(each) for each in reply] if isinstance(reply, list) else reply.token_ids

    return of(replies)


def test_each_query_has_its_own_choice() -> None:
    star = engine("llama", **SIZES)
    context = star.encode(ids(CONTEXT))
    queries = [ids(QUERY, seed=seed) for seed in (2, 3, 4)]
    alone = [tokens(star, context, query) for query in queries]
    assert tokens(star, context, queries) == alone
    assert alone != tokens(star, context, queries, second_look=0)
    several = dict(do_sample=True, seed=3, num_return_sequences=2)
    assert tokens(star, context, queries, **several) == [
        tokens(star, context, query, **several) for query in queries
    ]
    prepared = star.prepare(ids(CONTEXT), queries, **LOOK)
    replies = star.generate(star.encode(prepared), prepared)
    assert [reply.token_ids for reply in replies] == alone
    assert all(reply.timings.second_look_s > 0 for reply in replies)
    plain = star.generate(context, queries[0], max_new_tokens=1)
    assert plain.timings.second_look_s is None


@pytest.mark.parametrize(
    "settings", [dict(num_beams=3), dict(prompt_lookup_num_tokens=2)], ids=["beams", "lookup"]
)
def test_transformers_loops_look_too(settings: dict[str, Any]) -> None:
    """Everything computed again is dense attention: the stock model's own answer."""
    star = engine("llama", **SIZES)
    context_ids, query_ids = ids(CONTEXT), ids(QUERY, seed=2)
    context = star.encode(context_ids)
    answer = tokens(star, context, query_ids, second_look=1.0, **settings)
    stock, _ = stock_generate(
        tiny("llama"), context_ids + query_ids, max_new_tokens=STEPS, **settings
    )
    assert [answer] == stock
    assert answer != tokens(star, context, query_ids, second_look=0, **settings)


@pytest.mark.parametrize("form", [dict(kv_dtype="fp8"), dict(kv_device="cpu")], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_contexts_of_every_form(name: str, form: dict[str, Any], tmp_path: Any) -> None:
    """Stored, loaded and extended contexts answer alike, and stay as they are."""
    star = engine(name, **SIZES, **form)
    context = star.encode(ids(CONTEXT))
    before = stored(context)
    context.save(tmp_path / "book.star")
    as_computed = engine(name, **SIZES)
    right, *replies = (
        asked.generate(each, ids(QUERY, seed=2), return_logits=True, **LOOK)
        for asked, each in [
            (as_computed, as_computed.encode(ids(CONTEXT))),
            (star, context),
            (star, star.load_context(tmp_path / "book.star")),
            (star, star.extend(star.encode(ids(80)), ids(CONTEXT)[80:])),
        ]
    )
    for reply in replies:
        assert_close(reply.logits[0], right.logits[0], 0.5 if "kv_dtype" in form else TOLERANCE)
    assert torch.equal(replies[0].logits, replies[1].logits)
    for layer, layer_before in zip(stored(context), before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(layer, layer_before, strict=True))


def test_a_suspended_stream_keeps_its_look() -> None:
    """Other questions, looking elsewhere or not at all, in the middle of a stream change nothing,
    and a stream that has ended holds no copy of the context."""
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=4)
    context = star.encode(spelling.CONTEXT)
    look: dict[str, Any] = dict(second_look=0.2, max_new_tokens=12, ignore_eos=True)
    expected, plain = (
        star.generate(context, spelling.QUERY, **look | dict(second_look=share)).token_ids
        for share in (0.2, 0)
    )
    copies: list[weakref.ref[ContextKV]] = []
    copied = ContextKV.copied

    def noted(kv: ContextKV, segments: Segments, runs: Any) -> ContextKV:
        copies.append(weakref.ref(copy := copied(kv, segments, runs)))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContextKV, "copied", noted)
        stream = star.stream(context, spelling.QUERY, **look)
        for _ in stream:
            assert star.generate(context, spelling.QUERY[::-1], **look)
            reply = star.generate(context, spelling.QUERY, **look | dict(second_look=0))
            assert reply.token_ids == plain
    assert stream.result.token_ids == expected != plain
    assert stream.result.timings.second_look_s is not None
    assert len(copies) > 2
    assert not any(copy() for copy in copies)


def test_the_pipeline_and_asyncio_look_too() -> None:
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=4)
    look: dict[str, Any] = dict(second_look=0.2, max_new_tokens=6)
    context = star.encode(spelling.CONTEXT)
    right = star.generate(context, spelling.QUERY, **look).text
    assert right != star.generate(context, spelling.QUERY, **look | dict(second_look=0)).text
    pipe = star_attention.pipeline(star)
    answer = pipe(spelling.CONTEXT, question=spelling.QUERY, chat=False, **look)
    assert answer["answer"] == right
    assert asyncio.run(star.agenerate(context, spelling.QUERY, **look)).text == right


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (-0.1, "second_look -0.1 is not a share from 0 to 1; give"),
        (1.5, "second_look 1.5 is not a share from 0 to 1; give"),
        (float("nan"), "second_look nan is not a share from 0 to 1; give"),
        ("0.1", "second_look '0.1': expected a number, got str; give"),
        (True, "second_look True: expected a number, got bool; give"),
        (None, "second_look None: expected a number, got NoneType; give"),
    ],
)
def test_what_is_no_share_is_refused(share: Any, message: str) -> None:
    star = engine("llama", **SIZES)
    with pytest.raises(InvalidInputError, match="^" + message):
        star.check_settings(second_look=share)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("dense", "every token of a dense context has seen all tokens before it; leave"),
        ("ring", "every token of a ring context has seen all tokens before it; leave"),
        ("streaming_llm", "a streaming_llm context holds its first and last tokens only; leave"),
    ],
)
def test_methods_without_a_second_look_refuse_it(method: str, reason: str) -> None:
    """The context's own method counts, wherever it is asked; before anything is encoded."""
    star = engine("llama", method=method, tokens_per_forward=40)
    context = star.encode(ids(40))
    query, look = ids(QUERY), dict(second_look=0.1)
    message = f"^second_look 0.1 does not work: {reason}"
    for call in (
        lambda: star.generate(context, query, **look),
        lambda: engine("llama").generate(context, query, **look),
        lambda: star.check_settings(**look),
        lambda: star.prepare(ids(40), query, **look),
        lambda: star.encode(ids(40), query=query, settings=look),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_contexts_that_keep_the_last_window_refuse_it() -> None:
    """Forbids tokens computed again without what they saw; before anything is encoded."""
    star, query, look = (
        engine(
            "gemma3",
            **SIZES,
        ),
        ids(QUERY),
        dict(second_look=0.1),
    )
    star = star.with_config(kv_windows="last")
    message = (
        r"^second_look 0.1 does not work: 2 of 3 layers have a sliding window, of which a context"
        r" of 101 tokens keeps the last one alone; encode it with kv_windows='all'"
        r" \(--kv-windows all\), or leave it out"
    )
    for call in (
        lambda: star.generate(star.encode(ids(CONTEXT)), query, **look),
        lambda: star.prepare(ids(CONTEXT), query, **look),
        lambda: star.encode(ids(CONTEXT), query=query, settings=look),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()
    # As long as nothing has been dropped, nothing is missing.
    star.generate(star.encode(ids(WINDOW - 1)), query, max_new_tokens=1, **look)


@pytest.mark.parametrize(
    ("share", "length", "count"), [(0.1, 30, 3), (0.1, 31, 4), (1, 7, 7), (1e-3, 5, 1), (0, 9, 0)]
)
def test_shares_are_rounded_up(share: float, length: int, count: int) -> None:
    """Forbids 4 tokens of 30: 0.1 * 30 is a little more than 3."""
    assert chosen_tokens(share, length) == count


def test_no_room_for_the_copy_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kv: ContextKV, segments: Segments, runs: Any) -> ContextKV:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ContextKV, "copied", fail)
    star = engine("llama", **SIZES)
    context = star.encode(ids(CONTEXT))
    message = (
        f"^out of memory with second_look 0.3, .* \\({context.nbytes:,} bytes on rank 0\\): leave"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        tokens(star, context, ids(QUERY))


def test_pairs_where_layers_look_back() -> None:
    """A chosen token then sees its block, the anchor and the chosen tokens in the other layers."""
    plan = BlockPlan(context_tokens=40, block_size=16, anchor_size=7)
    own, anchor, others = (136 + 136 + 36) // 2, (8 + 4) * 7, int(8 * 9 / 2 + 4 * 25 / 2)
    assert renewed_pairs(plan, 0.5, sees_all=False) == own + anchor + others
    assert renewed_pairs(plan, 0.5, sees_all=True) == 40 * 41 // 4
    assert renewed_pairs(plan, 1, sees_all=False) == 40 * 41 // 2
