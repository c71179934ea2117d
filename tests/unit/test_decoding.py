"""Decoding: with one block every way of choosing tokens is the stock model's own, and several queries are as one each."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from star_attention.generation.settings import resolve_generation_kwargs
from tests.engines import CONTEXT, QUERY, VARIED, engine, ids, stock_generate, tiny

STEPS = 8
SAMPLING: dict[str, Any] = dict(do_sample=True, temperature=1.3, top_k=50, top_p=0.9)


def stock_words(words: dict[str, Any]) -> dict[str, Any]:
    """The tiny models' own settings hold no token that ends an answer."""
    return dict(max_new_tokens=STEPS, **words)


def both(
    name: str, words: dict[str, Any], seed: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Answers of ours and of the stock model to one query on one dense context, a row each."""
    star = engine(name, method="dense")
    context = star.encode(ids(CONTEXT))
    replies = star.generate(context, ids(QUERY, seed=2), seed=seed, **stock_words(words))
    ours = [reply.token_ids for reply in (replies if isinstance(replies, list) else [replies])]
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        stock, _ = stock_generate(
            tiny(name),
            ids(CONTEXT) + ids(QUERY, seed=2),
            rope_length=context.rope_length,
            **stock_words(words),
        )
    return ours, stock


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3", "llama_dynamic_ntk"])
def test_sampling_with_a_seed_is_stock_sampling_under_manual_seed(name: str, seed: int) -> None:
    ours, stock = both(name, SAMPLING, seed)
    assert ours == stock


def test_several_sampled_answers_are_the_stock_ones() -> None:
    ours, stock = both("llama", SAMPLING | dict(num_return_sequences=3), seed=3)
    assert ours == stock
    assert len({tuple(row) for row in ours}) == 3


def test_without_a_seed_sampling_draws_from_the_global_generator() -> None:
    star = engine("llama", method="dense")
    context, query = star.encode(ids(CONTEXT)), ids(QUERY, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = star.generate(context, query, max_new_tokens=STEPS, **SAMPLING).token_ids
        second = star.generate(context, query, max_new_tokens=STEPS, **SAMPLING).token_ids
    seeded = star.generate(context, query, max_new_tokens=STEPS, seed=5, **SAMPLING).token_ids
    assert first == seeded != second


@pytest.fixture
def noise() -> Iterator[None]:
    """Another thread that draws from torch's global generator all the time."""
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(3)

    thread = threading.Thread(target=draw)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("noise")
def test_a_seed_repeats_whatever_runs_beside_it() -> None:
    star = engine("llama", block_size=16, anchor_size=16)
    context = star.encode(ids(CONTEXT))
    answers = {
        tuple(
            star.generate(
                context, ids(QUERY, seed=2), max_new_tokens=12, seed=11, **SAMPLING
            ).token_ids
        )
        for _ in range(4)
    }
    others = {
        tuple(
            star.generate(
                context, ids(QUERY, seed=2), max_new_tokens=12, seed=seed, **SAMPLING
            ).token_ids
        )
        for seed in range(3)
    }
    assert len(answers) == 1
    assert len(others | answers) == 4


def test_a_seed_leaves_the_global_generator_alone() -> None:
    star = engine("llama", block_size=16)
    context, before = star.encode(ids(CONTEXT)), torch.get_rng_state()
    star.generate(context, [5], max_new_tokens=3, seed=1, do_sample=True)
    star.generate(context, [5], max_new_tokens=3, seed=1, do_sample=True, num_beams=2)
    assert torch.equal(torch.get_rng_state(), before)


STOCK_MODES: dict[str, dict[str, Any]] = {
    "beams": dict(num_beams=3),
    "beams_returned": dict(num_beams=4, num_return_sequences=3),
    "beam_sampling": dict(num_beams=3, do_sample=True, temperature=1.5, top_k=30),
    "prompt_lookup": dict(prompt_lookup_num_tokens=3),
    "repetition_penalty": dict(repetition_penalty=1.8),
    "no_repeat_ngram": dict(no_repeat_ngram_size=2),
    "penalty_in_beams": dict(num_beams=3, repetition_penalty=1.8),
    "bad_words": dict(bad_words_ids=[[i] for i in range(3, 120)]),
    "min_p": dict(do_sample=True, min_p=0.05),
}


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma3", "gpt_oss", "deepseek_v3", "gemma3n", "phi3_longrope"]
)
@pytest.mark.parametrize("mode", STOCK_MODES)
def test_decoding_modes_are_the_stock_ones(mode: str, name: str) -> None:
    if name == "phi3_longrope" and mode == "penalty_in_beams":
        pytest.skip("beams are given the query alone where rotary frequencies depend on the length")
    ours, stock = both(name, STOCK_MODES[mode], seed=1)
    assert ours == stock


class _Follow(LogitsProcessor):
    """Most of the time lifts the token that follows the last one in a fixed order; else the model chooses another."""

    def __init__(self, order: list[int]) -> None:
        self.next = {token: order[(at + 1) % len(order)] for at, token in enumerate(order)}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, tokens in enumerate(input_ids.tolist()):
            if tokens[-1] % 3 and tokens[-1] in self.next:
                scores[row, self.next[tokens[-1]]] += 100.0
            scores[row, tokens[-1]] = -torch.inf
        return scores


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize(
    "settings", [dict(method="dense"), dict(block_size=16, anchor_size=10)], ids=["dense", "star"]
)
def test_prompt_lookup_gives_the_greedy_answer(name: str, settings: dict[str, Any]) -> None:
    """Transformers gives assisted decoding the context once more, behind what is cached: answers were wrong.

    The context spells an order that the answer follows for stretches, so that guesses are taken and refused.
    """
    star = engine(name, **settings)
    order = ids(24, seed=9)
    context = star.encode((order * 5)[:CONTEXT])
    words: dict[str, Any] = dict(
        max_new_tokens=30, logits_processor=LogitsProcessorList([_Follow(order)])
    )
    forwards: list[int] = []
    handle = tiny(name).get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        greedy = star.generate(context, order[5:9], **words)
        plain = len(forwards)
        assisted = star.generate(context, order[5:9], prompt_lookup_num_tokens=4, **words)
    finally:
        handle.remove()
    assert assisted.token_ids == greedy.token_ids
    assert plain == 30
    assert 30 / 5 < len(forwards) - plain < 30  # some guesses were taken, and some were not


def test_penalties_see_the_context() -> None:
    """A penalty that saw the query only would allow what stands in the context."""
    star = engine("llama", block_size=16, anchor_size=16)
    context_ids = [token for token in range(3, 200) if token != 150]
    context = star.encode(context_ids)
    plain = star.generate(context, [5, 6], max_new_tokens=4).token_ids
    assert 150 not in plain
    assert (
        star.generate(context, [5, 6], max_new_tokens=1, no_repeat_ngram_size=1).token_ids[0]
        not in context_ids
    )


@pytest.mark.parametrize(
    "settings", [dict(method="dense"), dict(block_size=16, anchor_size=10)], ids=["dense", "star"]
)
@pytest.mark.parametrize(
    "name", [*VARIED, "gpt2", "opt", "mixtral", "ministral3", "longcat_flash", "diffllama"]
)
def test_queries_in_a_padded_batch_are_as_alone(name: str, settings: dict[str, Any]) -> None:
    """Padding has no influence: each row has the tokens and the logits of its single run."""
    star = engine(name, tokens_per_forward=13, **settings)
    context = star.encode(ids(CONTEXT))
    queries = [ids(length, seed=length) for length in (30, 1, 7)]

    batch = star.generate(context, queries, max_new_tokens=STEPS, return_logits=True)
    for query, together in zip(queries, batch, strict=True):
        alone = star.generate(context, query, max_new_tokens=STEPS, return_logits=True)
        assert together.token_ids == alone.token_ids
        torch.testing.assert_close(together.logits, alone.logits, atol=1e-4, rtol=1e-4)
        assert together.query_tokens == len(query)


@pytest.mark.parametrize(
    "words",
    [
        dict(repetition_penalty=1.5),
        dict(no_repeat_ngram_size=2),
        dict(num_beams=3),
        dict(min_new_tokens=5),
    ],
    ids=lambda words: next(iter(words)),
)
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gpt_oss", "deepseek_v3", "llama_dynamic_ntk"]
)
def test_padding_is_not_text_to_any_mode(name: str, words: dict[str, Any]) -> None:
    """The filler between context and a short query used to count as text that was there: it was penalised."""
    star = engine(name, block_size=16, anchor_size=10)
    context = star.encode(ids(CONTEXT))
    queries = [ids(length, seed=length) for length in (9, 1, 4)]
    batch = star.generate(context, queries, max_new_tokens=STEPS, **words)
    alone = [star.generate(context, query, max_new_tokens=STEPS, **words) for query in queries]
    assert [reply.token_ids for reply in batch] == [reply.token_ids for reply in alone]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_filler_of_short_queries_is_not_penalised(num_beams: int) -> None:
    """A token that stands nowhere in a row keeps its scores, although the model pads with it."""
    star = engine("llama", block_size=16)
    context = star.encode(ids(CONTEXT))
    favourite = LogitsProcessorList([_Favour(0)])  # the padding id
    words: dict[str, Any] = dict(max_new_tokens=1, logits_processor=favourite, num_beams=num_beams)
    assert [r.token_ids for r in star.generate(context, [[20] * 6, [30]], **words)] == [[0], [0]]


class _Favour(LogitsProcessor):
    """Lifts one token well above the others, unless it was seen."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        seen = (input_ids == self.token).any(1)
        scores[:, self.token] = torch.where(seen, -1e3, 1e3)
        return scores


def test_the_filler_does_not_part_context_and_query() -> None:
    """A pair of tokens across the cut is a pair that was there, in a padded row too."""
    star = engine("llama", block_size=16)
    context = star.encode([*ids(CONTEXT), 210])
    queries = [[209, 20, 30, 40], [209]]
    order = LogitsProcessorList([_Order([210, 209])])
    words: dict[str, Any] = dict(max_new_tokens=2, logits_processor=order)
    assert [r.token_ids for r in star.generate(context, queries, **words)] == [[210, 209]] * 2
    for reply in star.generate(context, queries, no_repeat_ngram_size=2, **words):
        assert reply.token_ids[0] == 210
        assert reply.token_ids[1] != 209


class _Order(LogitsProcessor):
    """Lifts the first of two tokens, and the second after it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = 1 if int(input_ids[0, -1]) == self.tokens[0] else 0
        scores = scores.clone()
        scores[:, self.tokens[at]] += 1e3
        return scores


def test_beams_of_a_padded_batch_are_as_alone() -> None:
    star = engine("gemma3", block_size=16, anchor_size=10)
    context = star.encode(ids(CONTEXT))
    queries = [ids(length, seed=length) for length in (30, 1, 7)]
    words: dict[str, Any] = dict(max_new_tokens=STEPS, num_beams=3, num_return_sequences=2)
    batch = star.generate(context, queries, **words)
    assert [len(row) for row in batch] == [2, 2, 2]
    for query, together in zip(queries, batch, strict=True):
        alone = star.generate(context, query, **words)
        assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]


@pytest.fixture(scope="module")
def llama() -> tuple[StarLLM, EncodedContext]:
    star = engine("llama", block_size=16, anchor_size=16)
    return star, star.encode(ids(CONTEXT))


def test_shape_of_results(llama: tuple[StarLLM, EncodedContext]) -> None:
    """One query: an answer, or a list of n. A list of queries, of one too: a list of these."""
    star, context = llama
    one, n = (
        dict(max_new_tokens=2),
        dict(max_new_tokens=2, do_sample=True, num_return_sequences=2, seed=0),
    )
    assert len(star.generate(context, [5, 6], **one).token_ids) == 2
    assert [len(r.token_ids) for r in star.generate(context, [5, 6], **n)] == [2, 2]
    assert [len(r.token_ids) for r in star.generate(context, [[5, 6]], **one)] == [2]
    assert [len(row) for row in star.generate(context, [[5, 6]], **n)] == [2]
    assert [len(row) for row in star.generate(context, [[5, 6], [7]], **n)] == [2, 2]
    tensor = torch.tensor([[5, 6], [8, 7]])
    assert [r.token_ids for r in star.generate(context, tensor, **one)] == [
        star.generate(context, row, **one).token_ids for row in tensor
    ]
    assert (
        star.generate(context, tensor[:1], **one).token_ids
        == star.generate(context, [5, 6], **one).token_ids
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


@pytest.mark.parametrize(
    "words", [dict(temperature=0), dict(temperature=0.0, top_p=0.9, do_sample=True)]
)
def test_temperature_zero_is_greedy(
    llama: tuple[StarLLM, EncodedContext], words: dict[str, Any]
) -> None:
    star, context = llama
    query = ids(QUERY, seed=2)
    greedy = star.generate(context, query, max_new_tokens=STEPS).token_ids
    assert star.generate(context, query, max_new_tokens=STEPS, **words).token_ids == greedy


def test_greedy_search_is_given_no_sampling_words() -> None:
    """Transformers logs a warning about each."""
    words = dict(temperature=0, top_p=0.9, top_k=3, do_sample=True)
    _, resolved = resolve_generation_kwargs(tiny("llama"), words, 5, ignore_eos=False)
    assert resolved["do_sample"] is False
    assert [resolved[word] for word in ("temperature", "top_p", "top_k")] == [None] * 3


def test_temperature_alone_means_sampling(llama: tuple[StarLLM, EncodedContext]) -> None:
    star, context = llama
    words: dict[str, Any] = dict(max_new_tokens=12, temperature=3.0)
    answers = {
        tuple(star.generate(context, [5], seed=seed, **words).token_ids) for seed in range(4)
    }
    assert len(answers) == 4


def test_logits_are_the_stock_ones_before_processing() -> None:
    star = engine("llama", method="dense")
    context, query = star.encode(ids(CONTEXT)), ids(QUERY, seed=2)
    words: dict[str, Any] = dict(max_new_tokens=STEPS, repetition_penalty=1.7)
    reply = star.generate(context, query, return_logits=True, **words)
    [stock], stock_1TV = stock_generate(tiny("llama"), ids(CONTEXT) + query, **words)
    assert reply.token_ids == stock
    assert reply.logits.dtype == torch.float32
    torch.testing.assert_close(reply.logits, stock_1TV[0], atol=1e-4, rtol=0)
    assert star.generate(context, query, max_new_tokens=1).logits is None
    with pytest.raises(
        InvalidInputError, match="return_logits works with greedy search and sampling"
    ):
        star.generate(context, query, num_beams=2, return_logits=True)


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
    "word",
    ["max_length", "maximum_tokens", "output_scores", "past_key_values", "cache", "input_ids"],
)
def test_unknown_words_are_a_type_error(llama: tuple[StarLLM, EncodedContext], word: str) -> None:
    star, context = llama
    with pytest.raises(TypeError, match=word):
        star.generate(context, [5], **{word: 3})


def test_padded_beams_see_no_filler_inside_their_text(
    llama: tuple[StarLLM, EncodedContext],
) -> None:
    """Forbids filler between context and query, which would make n-grams of its own."""
    star, context = llama
    last, first = context.token_ids[-1].item(), context.token_ids[0].item()
    queries = [[int(last), 20, 30, 40], [int(first)]]
    words: dict[str, Any] = dict(num_beams=2, no_repeat_ngram_size=2, max_new_tokens=8)
    rows = star.generate(context, queries, **words)
    alone = [star.generate(context, query, **words) for query in queries]
    assert [row.token_ids for row in rows] == [row.token_ids for row in alone]


def test_a_context_is_freed_after_beams_without_the_collector() -> None:
    star = engine("llama", block_size=24)
    context = star.encode(ids(60))
    star.generate(context, [5, 6], num_beams=2, max_new_tokens=3)
    kept = weakref.ref(context.kv)
    gc.collect()
    gc.disable()
    try:
        star.generate(context, [5, 6], num_beams=2, max_new_tokens=3)
        del context
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("words", [dict(num_beams=2), dict(prompt_lookup_num_tokens=2)])
def test_penalties_that_would_not_see_the_context_are_refused(words: dict[str, Any]) -> None:
    star = engine("phi3_longrope", reserve_tokens=64)
    context = star.encode(ids(60))
    with pytest.raises(InvalidInputError, match="repetition_penalty does not work with beams"):
        star.generate(context, [5, 6], repetition_penalty=1.5, **words)
    assert len(star.generate(context, [5, 6], max_new_tokens=3, **words).token_ids) == 3


@pytest.mark.parametrize("words", [{}, dict(num_beams=2)])
def test_a_models_own_defaults_do_not_break_an_answer(words: dict[str, Any]) -> None:
    model = copy.deepcopy(tiny("llama"))
    star = StarLLM(model, block_size=24)
    context = star.encode(ids(60))
    expected = star.generate(context, [5, 6], max_new_tokens=3, **words).token_ids
    model.generation_config.return_dict_in_generate = True
    model.generation_config.cache_implementation = "static"
    assert star.generate(context, [5, 6], max_new_tokens=3, **words).token_ids == expected


@pytest.mark.parametrize(
    "words",
    [
        dict(prompt_lookup_num_tokens=0),
        dict(prompt_lookup_num_tokens="x"),
        dict(num_beams=2, sequence_bias={}),
    ],
)
def test_settings_that_transformers_refuses_late_are_errors_of_ours(
    llama: tuple[StarLLM, EncodedContext], words: dict[str, Any]
) -> None:
    star, context = llama
    with pytest.raises(InvalidInputError):
        star.generate(context, [5, 6], max_new_tokens=3, **words)


def test_prompt_lookup_answers_several_queries(llama: tuple[StarLLM, EncodedContext]) -> None:
    star, context = llama
    rows = star.generate(context, [[5, 6], [7, 8]], prompt_lookup_num_tokens=2, max_new_tokens=4)
    assert [row.token_ids for row in rows] == [
        star.generate(context, query, max_new_tokens=4).token_ids for query in ([5, 6], [7, 8])
    ]
