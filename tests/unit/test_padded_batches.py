"""Several queries in one batch: padding has no influence on any answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext, StarLLM
from tests.engines import CONTEXT, VARIED, engine, ids
from tests.tiers import in_turn

STEPS = 8


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.5),
        dict(no_repeat_ngram_size=2),
        dict(num_beams=3),
        dict(min_new_tokens=5),
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gpt_oss", "deepseek_v3", "llama_dynamic_ntk"]
)
def test_padding_is_not_text_to_any_mode(name: str, options: dict[str, Any]) -> None:
    """Forbids penalties on the filler between the context and a short query."""
    star = engine(name, block_size=16, anchor_size=10)
    context = star.encode(ids(CONTEXT))
    queries = [ids(length, seed=length) for length in (9, 1, 4)]
    batch = star.generate(context, queries, max_new_tokens=STEPS, **options)
    alone = [star.generate(context, query, max_new_tokens=STEPS, **options) for query in queries]
    assert [reply.token_ids for reply in batch] == [reply.token_ids for reply in alone]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_filler_of_short_queries_is_not_penalized(num_beams: int) -> None:
    """A token that does not occur in a row keeps its scores, although the model pads with it."""
    star = engine("llama", block_size=16)
    context = star.encode(ids(CONTEXT))
    favorite = LogitsProcessorList([_Favor(0)])  # the padding id
    options: dict[str, Any] = dict(max_new_tokens=1, logits_processor=favorite, num_beams=num_beams)
    assert [r.token_ids for r in star.generate(context, [[20] * 6, [30]], **options)] == [[0], [0]]


class _Favor(LogitsProcessor):
    """Lifts one token well above the others, unless the row has it."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        seen = (input_ids == self.token).any(1)
        scores[:, self.token] = torch.where(seen, -1e3, 1e3)
        return scores


def test_the_filler_does_not_separate_context_and_query() -> None:
    """A pair of tokens across the cut counts as a pair, in a padded row too."""
    star = engine("llama", block_size=16)
    context = star.encode([*ids(CONTEXT), 210])
    queries = [[209, 20, 30, 40], [209]]
    order = LogitsProcessorList([_Order([210, 209])])
    options: dict[str, Any] = dict(max_new_tokens=2, logits_processor=order)
    assert [r.token_ids for r in star.generate(context, queries, **options)] == [[210, 209]] * 2
    for reply in star.generate(context, queries, no_repeat_ngram_size=2, **options):
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


@pytest.fixture(scope="module")
def llama() -> tuple[StarLLM, EncodedContext]:
    star = engine("llama", block_size=16, anchor_size=16)
    return star, star.encode(ids(CONTEXT))


def test_padded_beams_see_no_filler_inside_their_text(
    llama: tuple[StarLLM, EncodedContext],
) -> None:
    """Forbids filler between context and query, which would make n-grams of its own."""
    star, context = llama
    last, first = context.token_ids[-1].item(), context.token_ids[0].item()
    queries = [[int(last), 20, 30, 40], [int(first)]]
    options: dict[str, Any] = dict(num_beams=2, no_repeat_ngram_size=2, max_new_tokens=8)
    rows = star.generate(context, queries, **options)
    alone = [star.generate(context, query, **options) for query in queries]
    assert [row.token_ids for row in rows] == [row.token_ids for row in alone]


@pytest.mark.parametrize(
    ("name", "settings"),
    in_turn(
        2,
        [*VARIED, "gpt2", "opt", "mixtral", "ministral3", "longcat_flash", "diffllama"],
        [dict(method="dense"), dict(block_size=16, anchor_size=10)],
    ),
    ids=str,
)
def test_queries_in_a_padded_batch_equal_single_ones(name: str, settings: dict[str, Any]) -> None:
    """Each row has the tokens and the logits of its single run."""
    star = engine(name, tokens_per_forward=13, **settings)
    context = star.encode(ids(CONTEXT))
    queries = [ids(length, seed=length) for length in (30, 1, 7)]

    batch = star.generate(context, queries, max_new_tokens=STEPS, return_logits=True)
    for query, batched in zip(queries, batch, strict=True):
        alone = star.generate(context, query, max_new_tokens=STEPS, return_logits=True)
        assert batched.token_ids == alone.token_ids
        torch.testing.assert_close(batched.logits, alone.logits, atol=1e-4, rtol=1e-4)
        assert batched.query_tokens == len(query)


def test_beams_of_a_padded_batch_equal_single_ones() -> None:
    star = engine("gemma3", block_size=16, anchor_size=10)
    context = star.encode(ids(CONTEXT))
    queries = [ids(length, seed=length) for length in (30, 1, 7)]
    options: dict[str, Any] = dict(max_new_tokens=STEPS, num_beams=3, num_return_sequences=2)
    batch = star.generate(context, queries, **options)
    assert [len(row) for row in batch] == [2, 2, 2]
    for query, batched in zip(queries, batch, strict=True):
        alone = star.generate(context, query, **options)
        assert [reply.token_ids for reply in batched] == [reply.token_ids for reply in alone]
