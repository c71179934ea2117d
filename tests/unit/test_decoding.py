"""Decoding: prompt lookup, penalties, results, and settings that cannot work."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from tests.engines import CONTEXT, VARIED, engine, ids, tiny
from tests.tiers import in_turn

STEPS = 8


class _Follow(LogitsProcessor):
    """Mostly lifts the token that follows the last one in a fixed order; else the model chooses."""

    def __init__(self, order: list[int]) -> None:
        self.next = {token: order[(at + 1) % len(order)] for at, token in enumerate(order)}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, tokens in enumerate(input_ids.tolist()):
            if tokens[-1] % 3 and tokens[-1] in self.next:
                scores[row, self.next[tokens[-1]]] += 100.0
            scores[row, tokens[-1]] = -torch.inf
        return scores


@pytest.mark.parametrize(
    ("name", "settings"),
    in_turn(2, VARIED, [dict(method="dense"), dict(block_size=16, anchor_size=10)]),
    ids=str,
)
def test_prompt_lookup_gives_the_greedy_answer(name: str, settings: dict[str, Any]) -> None:
    """Forbids encoding the context twice: transformers passes it again although it is cached.

    The context spells an order that the answer follows in stretches, so that some drafts are
    accepted and some are not.
    """
    star = engine(name, **settings)
    order = ids(24, seed=9)
    context = star.encode((order * 5)[:CONTEXT])
    options: dict[str, Any] = dict(
        max_new_tokens=30, logits_processor=LogitsProcessorList([_Follow(order)])
    )
    # MLA's first answer sends a few tokens through the model to learn how it expands its keys.
    star.runtime.handle.probe_result  # noqa: B018
    forwards: list[int] = []
    handle = tiny(name).get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        greedy = star.generate(context, order[5:9], **options)
        plain = len(forwards)
        assisted = star.generate(context, order[5:9], prompt_lookup_num_tokens=4, **options)
    finally:
        handle.remove()
    assert assisted.token_ids == greedy.token_ids
    assert plain == 30
    # Some drafts were accepted, and some were not.
    assert 30 / 5 < len(forwards) - plain < 30


def test_penalties_see_the_context() -> None:
    """Forbids penalties that see the query alone and allow tokens of the context."""
    star = engine("llama", block_size=16, anchor_size=16)
    context_ids = [token for token in range(3, 200) if token != 150]
    context = star.encode(context_ids)
    plain = star.generate(context, [5, 6], max_new_tokens=4).token_ids
    assert 150 not in plain
    assert (
        star.generate(context, [5, 6], max_new_tokens=1, no_repeat_ngram_size=1).token_ids[0]
        not in context_ids
    )


@pytest.fixture(scope="module")
def llama() -> tuple[StarLLM, EncodedContext]:
    star = engine("llama", block_size=16, anchor_size=16)
    return star, star.encode(ids(CONTEXT))


def test_shape_of_results(llama: tuple[StarLLM, EncodedContext]) -> None:
    """One query gives an answer, or a list of n; a list of queries gives a list of these."""
    star, context = llama
    single, several = (
        dict(max_new_tokens=2),
        dict(max_new_tokens=2, do_sample=True, num_return_sequences=2, seed=0),
    )
    assert len(star.generate(context, [5, 6], **single).token_ids) == 2
    assert [len(r.token_ids) for r in star.generate(context, [5, 6], **several)] == [2, 2]
    assert [len(r.token_ids) for r in star.generate(context, [[5, 6]], **single)] == [2]
    assert [len(row) for row in star.generate(context, [[5, 6]], **several)] == [2]
    assert [len(row) for row in star.generate(context, [[5, 6], [7]], **several)] == [2, 2]
    tensor = torch.tensor([[5, 6], [8, 7]])
    assert [r.token_ids for r in star.generate(context, tensor, **single)] == [
        star.generate(context, row, **single).token_ids for row in tensor
    ]
    assert (
        star.generate(context, tensor[:1], **single).token_ids
        == star.generate(context, [5, 6], **single).token_ids
    )


def test_sampled_answers_of_a_batch_stay_with_their_query(
    llama: tuple[StarLLM, EncodedContext],
) -> None:
    """With top_k=1 sampling is greedy, so each query's answers are known."""
    star, context = llama
    queries = [ids(5, seed=3), ids(2, seed=4)]
    rows = star.generate(
        context, queries, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2
    )
    for query, row in zip(queries, rows, strict=True):
        greedy = star.generate(context, query, max_new_tokens=5).token_ids
        assert [reply.token_ids for reply in row] == [greedy, greedy]
        assert [reply.query_tokens for reply in row] == [len(query)] * 2


@pytest.mark.parametrize("tokens_per_forward", [1, 3, 8192])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "diffllama"])
def test_a_long_query_may_take_several_forwards(name: str, tokens_per_forward: int) -> None:
    star = engine(name, method="dense", tokens_per_forward=tokens_per_forward)
    context, query = star.encode(ids(31)), ids(37, seed=2)
    with torch.no_grad():
        expected_QV = tiny(name)(torch.tensor([ids(31) + query]), use_cache=False).logits[0, 31:]
    torch.testing.assert_close(star.logits(context, query), expected_QV, atol=1e-4, rtol=0)


def test_greedy_search_has_one_answer(llama: tuple[StarLLM, EncodedContext]) -> None:
    star, context = llama
    with pytest.raises(InvalidInputError, match="num_return_sequences"):
        star.generate(context, [5], num_return_sequences=2)


@pytest.mark.parametrize(
    "name",
    ["max_length", "maximum_tokens", "output_scores", "past_key_values", "cache", "input_ids"],
)
def test_unknown_keywords_are_a_type_error(
    llama: tuple[StarLLM, EncodedContext], name: str
) -> None:
    star, context = llama
    with pytest.raises(TypeError, match=name):
        star.generate(context, [5], **{name: 3})


def test_a_context_is_freed_after_beams_without_the_collector() -> None:
    star = engine("llama", block_size=24)
    context = star.encode(ids(60))
    star.generate(context, [5, 6], num_beams=2, max_new_tokens=3)
    kv = weakref.ref(context.kv)
    gc.collect()
    gc.disable()
    try:
        star.generate(context, [5, 6], num_beams=2, max_new_tokens=3)
        del context
        assert kv() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [dict(num_beams=2), dict(prompt_lookup_num_tokens=2)])
def test_penalties_that_would_not_see_the_context_are_refused(options: dict[str, Any]) -> None:
    star = engine("phi3_longrope", reserve_tokens=64)
    context = star.encode(ids(60))
    with pytest.raises(InvalidInputError, match="repetition_penalty does not work with beams"):
        star.generate(context, [5, 6], repetition_penalty=1.5, **options)
    assert len(star.generate(context, [5, 6], max_new_tokens=3, **options).token_ids) == 3


@pytest.mark.parametrize("options", [{}, dict(num_beams=2)])
def test_a_models_own_defaults_do_not_break_an_answer(options: dict[str, Any]) -> None:
    model = copy.deepcopy(tiny("llama"))
    star = StarLLM(model, block_size=24)
    context = star.encode(ids(60))
    expected = star.generate(context, [5, 6], max_new_tokens=3, **options).token_ids
    model.generation_config.return_dict_in_generate = True
    model.generation_config.cache_implementation = "static"
    assert star.generate(context, [5, 6], max_new_tokens=3, **options).token_ids == expected


@pytest.mark.parametrize(
    "options",
    [
        dict(prompt_lookup_num_tokens=0),
        dict(prompt_lookup_num_tokens="x"),
        dict(num_beams=2, sequence_bias={}),
    ],
)
def test_settings_that_transformers_refuses_late_are_errors_of_ours(
    llama: tuple[StarLLM, EncodedContext], options: dict[str, Any]
) -> None:
    star, context = llama
    with pytest.raises(InvalidInputError):
        star.generate(context, [5, 6], max_new_tokens=3, **options)


def test_prompt_lookup_answers_several_queries(llama: tuple[StarLLM, EncodedContext]) -> None:
    star, context = llama
    rows = star.generate(context, [[5, 6], [7, 8]], prompt_lookup_num_tokens=2, max_new_tokens=4)
    assert [row.token_ids for row in rows] == [
        star.generate(context, query, max_new_tokens=4).token_ids for query in ([5, 6], [7, 8])
    ]
