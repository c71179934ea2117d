"""Sampling and search: with one block every mode is the stock model's own, and seeds repeat."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from star_attention.generation.arguments import resolve_generation_kwargs
from tests.engines import CONTEXT, QUERY, engine, ids, stock_generate, tiny
from tests.tiers import in_turn

STEPS = 8
SAMPLING: dict[str, Any] = dict(do_sample=True, temperature=1.3, top_k=50, top_p=0.9)


def stock_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for the stock model; the tiny models have no end-of-sequence token."""
    return dict(max_new_tokens=STEPS, **options)


def both(
    name: str, options: dict[str, Any], seed: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Return our answers and the stock model's to one query on one dense context, a row each."""
    star = engine(name, method="dense")
    context = star.encode(ids(CONTEXT))
    replies = star.generate(context, ids(QUERY, seed=2), seed=seed, **stock_options(options))
    ours = [reply.token_ids for reply in (replies if isinstance(replies, list) else [replies])]
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        stock, _ = stock_generate(
            tiny(name),
            ids(CONTEXT) + ids(QUERY, seed=2),
            rope_length=context.rope_length,
            **stock_options(options),
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
    """Run a thread that draws from torch's global generator all the time."""
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
def test_a_seed_repeats_whatever_else_runs() -> None:
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


SEEDED: dict[str, dict[str, Any]] = {
    "sampling": SAMPLING,
    "several_answers": SAMPLING | dict(num_return_sequences=3),
    "penalty": SAMPLING | dict(repetition_penalty=1.3),
    "beams": dict(do_sample=True, num_beams=2, temperature=1.5),
    "prompt_lookup": SAMPLING | dict(prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize(
    ("name", "kind"), in_turn(2, ["llama", "gpt_oss", "phi3_longrope"], list(SEEDED))
)
def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(name: str, kind: str) -> None:
    star = engine(name, block_size=16, anchor_size=16)
    context, queries = star.encode(ids(CONTEXT)), [[5], [6, 7, 8, 9], [5, 6], [6, 7]]
    options = SEEDED[kind] | dict(seed=4, max_new_tokens=STEPS)
    alone = [star.generate(context, query, **options) for query in queries]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2]):
        batch = star.generate(context, [queries[index] for index in order], **options)
        for index, replies in zip(order, batch, strict=True):
            assert token_ids(replies) == token_ids(alone[index])
    # The queries make a difference.
    assert len({str(token_ids(replies)) for replies in alone}) == 4


def token_ids(replies: Any) -> list[list[int]]:
    """The ids of an answer, or of several."""
    return [reply.token_ids for reply in (replies if isinstance(replies, list) else [replies])]


def test_without_a_seed_rows_differ() -> None:
    star = engine("llama", block_size=16)
    replies = star.generate(star.encode(ids(CONTEXT)), [[5]] * 4, max_new_tokens=STEPS, **SAMPLING)
    assert len({tuple(reply.token_ids) for reply in replies}) > 1


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
        pytest.skip("beams get the query alone where rotary frequencies depend on the length")
    ours, stock = both(name, STOCK_MODES[mode], seed=1)
    assert ours == stock


@pytest.fixture(scope="module")
def llama() -> tuple[StarLLM, EncodedContext]:
    star = engine("llama", block_size=16, anchor_size=16)
    return star, star.encode(ids(CONTEXT))


@pytest.mark.parametrize(
    "options", [dict(temperature=0), dict(temperature=0.0, top_p=0.9, do_sample=True)]
)
def test_temperature_zero_is_greedy(
    llama: tuple[StarLLM, EncodedContext], options: dict[str, Any]
) -> None:
    star, context = llama
    query = ids(QUERY, seed=2)
    greedy = star.generate(context, query, max_new_tokens=STEPS).token_ids
    assert star.generate(context, query, max_new_tokens=STEPS, **options).token_ids == greedy


def test_greedy_search_gets_no_sampling_options() -> None:
    """Transformers logs a warning about each."""
    options = dict(temperature=0, top_p=0.9, top_k=3, do_sample=True)
    _, resolved = resolve_generation_kwargs(tiny("llama"), options, 5, ignore_eos=False)
    assert resolved["do_sample"] is False
    assert [resolved[name] for name in ("temperature", "top_p", "top_k")] == [None] * 3


def test_temperature_alone_means_sampling(llama: tuple[StarLLM, EncodedContext]) -> None:
    star, context = llama
    options: dict[str, Any] = dict(max_new_tokens=12, temperature=3.0)
    answers = {
        tuple(star.generate(context, [5], seed=seed, **options).token_ids) for seed in range(4)
    }
    assert len(answers) == 4


def test_logits_are_the_stock_ones_before_processing() -> None:
    star = engine("llama", method="dense")
    context, query = star.encode(ids(CONTEXT)), ids(QUERY, seed=2)
    options: dict[str, Any] = dict(max_new_tokens=STEPS, repetition_penalty=1.7)
    reply = star.generate(context, query, return_logits=True, **options)
    [stock], stock_1TV = stock_generate(tiny("llama"), ids(CONTEXT) + query, **options)
    assert reply.token_ids == stock
    assert reply.logits.dtype == torch.float32
    torch.testing.assert_close(reply.logits, stock_1TV[0], atol=1e-4, rtol=0)
    assert star.generate(context, query, max_new_tokens=1).logits is None
    with pytest.raises(
        InvalidInputError, match="return_logits works with greedy search and sampling"
    ):
        star.generate(context, query, num_beams=2, return_logits=True)
