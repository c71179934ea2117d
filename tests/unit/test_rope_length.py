"""The length that LongRoPE and dynamic NTK take frequencies for: short ones wherever all fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.errors import ContextLengthError
from tests.engines import ids
from tests.families import build
from tests.refusals import refused

ORIGINAL = 64
FIT = "fit the 64 tokens of the model's short rotary factors"


def star_of(family: str = "phi3_longrope", **settings: Any) -> StarLLM:
    return StarLLM(build(family), method="dense", **settings)


def stock_logits(star: StarLLM, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return star.model(torch.tensor([prompt]), use_cache=False).logits[0, -1].float()


def answer_settings(tokens: int) -> dict[str, Any]:
    return dict(settings=dict(max_new_tokens=tokens))


@pytest.mark.parametrize("length", [20, 40, 60])
def test_a_known_answer_within_the_original_length_gets_the_short_factors(length: int) -> None:
    """Forbids the long factors because of room that nobody asked for (`reserve_tokens`)."""
    star = star_of()
    context = star.encode(ids(length), query=[5], **answer_settings(3))
    assert context.rope_length == ORIGINAL
    torch.testing.assert_close(
        star.logits(context, [5])[-1], stock_logits(star, [*ids(length), 5]), atol=1e-5, rtol=1e-4
    )
    prepared = star.prepare(ids(length), [5], max_new_tokens=3)
    assert star.encode(prepared).rope_length == ORIGINAL
    stock = star.model.generate(
        torch.tensor([[*ids(length), 5]]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    reply = star.generate(star.encode(prepared), prepared)
    assert reply.token_ids == stock[0, length + 1 :].tolist()


def test_the_boundary_is_exact() -> None:
    """64 tokens in all are short ones, 65 are long ones, as in the model's own forward."""
    star = star_of()
    for needed, rope_length in ((ORIGINAL, ORIGINAL), (ORIGINAL + 1, 40 + 1024)):
        context = star.encode(ids(40), query=[5, 6], **answer_settings(needed - 42))
        assert context.rope_length == rope_length
    for length in (ORIGINAL - 1, ORIGINAL):
        star = star_of(reserve_tokens=1)
        context = star.encode(ids(length))
        assert context.rope_length == length + 1
        torch.testing.assert_close(
            star.logits(context, [5])[-1],
            stock_logits(star, [*ids(length), 5]),
            atol=1e-5,
            rtol=1e-4,
        )


def test_the_longest_of_several_queries_counts() -> None:
    star = star_of()
    queries = [[5], ids(20)]
    assert star.encode(ids(40), query=queries, **answer_settings(4)).rope_length == ORIGINAL
    assert star.encode(ids(40), query=queries, **answer_settings(5)).rope_length == 40 + 1024
    short, long = star.encode([ids(30), ids(45)], query=queries, **answer_settings(4))
    assert (short.rope_length, long.rope_length) == (ORIGINAL, 45 + 1024)


def test_contexts_of_one_length_and_different_needs_are_not_one_batch() -> None:
    star = star_of()
    prepared = [star.prepare(ids(40), query, max_new_tokens=4) for query in ([5], ids(30))]
    assert [star.encode(each).rope_length for each in prepared] == [ORIGINAL, 40 + 1024]


def test_long_factors_that_an_answer_does_not_need_are_a_warning() -> None:
    """Forbids another answer than the model's own without a word."""
    star = star_of()
    context = star.encode(ids(40))
    assert context.rope_length == 40 + 1024
    with pytest.warns(UserWarning, match=FIT):
        star.logits(context, [5])
    with pytest.warns(UserWarning, match=FIT):
        star.generate(context, [5], max_new_tokens=ORIGINAL - 41)
    assert star.generate(context, [5], max_new_tokens=ORIGINAL - 40).finish_reason


def test_a_context_of_short_factors_has_no_room_beyond_them() -> None:
    star = star_of()
    context = star.encode(ids(40), query=[5], **answer_settings(3))
    refused(
        ContextLengthError,
        "need 65 tokens",
        "pinned to 64",
        call=lambda: star.generate(context, [5], max_new_tokens=ORIGINAL - 40),
    )


def test_dynamic_ntk_within_the_original_length_is_not_stretched() -> None:
    star = star_of("llama_dynamic_ntk")
    original = star.model.config.max_position_embeddings
    length = original - 10
    context = star.encode(ids(length), query=[5], **answer_settings(9))
    assert context.rope_length == original
    torch.testing.assert_close(
        star.logits(context, [5])[-1], stock_logits(star, [*ids(length), 5]), atol=1e-5, rtol=1e-4
    )


def test_other_models_have_no_such_length() -> None:
    assert star_of("llama").encode(ids(40), query=[5], **answer_settings(3)).rope_length is None
