"""Endings of answers: end-of-sequence tokens, stop strings, criteria, length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    StoppingCriteria,
    StoppingCriteriaList,
)

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text.stops import StopStringCutter
from tests.engines import bundled_tokenizer, text_model
from tests.spelling import CONTEXT, QUERY, ids_of, spell

MODES = [{}, dict(num_beams=2), dict(do_sample=True, seed=1)]


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=16)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode(CONTEXT)
    return context


# ------------------------------------------------------------------------------------ finish_reason


def test_an_answer_ends_with_eos(star: StarLLM, context: EncodedContext) -> None:
    reply = star.generate(context, QUERY, **spell(context, "5335582", then="<eos>"))
    assert reply.finish_reason == "stop"
    assert reply.token_ids == [*ids_of("5335582"), star.tokenizer.eos_token_id]
    assert str(reply) == reply.text == "5335582"


@pytest.mark.parametrize("kwargs", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_ignore_eos_continues(
    star: StarLLM, context: EncodedContext, kwargs: dict[str, Any]
) -> None:
    reply = star.generate(
        context,
        QUERY,
        max_new_tokens=20,
        ignore_eos=True,
        **kwargs,
        **spell(context, "7", then="<eos>"),
    )
    assert reply.token_ids == [*ids_of("7"), *[star.tokenizer.eos_token_id] * 19]
    assert (reply.text, reply.finish_reason) == ("7", "length")


@pytest.mark.parametrize("max_new_tokens", [1, 3])
def test_length_ends_an_answer(star: StarLLM, context: EncodedContext, max_new_tokens: int) -> None:
    reply = star.generate(context, QUERY, max_new_tokens=max_new_tokens)
    assert len(reply.token_ids) == max_new_tokens
    assert reply.finish_reason == "length"


def test_eos_as_the_last_possible_token_is_a_stop(star: StarLLM, context: EncodedContext) -> None:
    reply = star.generate(context, QUERY, max_new_tokens=1, **spell(context, "", then="<eos>"))
    assert (reply.finish_reason, reply.text) == ("stop", "")


def test_eos_tokens_of_the_call_count(star: StarLLM, context: EncodedContext) -> None:
    [dot, seven] = ids_of(".7")
    reply = star.generate(
        context, QUERY, max_new_tokens=9, eos_token_id=[seven, dot], **spell(context, "The number")
    )
    assert reply.finish_reason == "stop"
    assert reply.token_ids == [*ids_of("The number"), dot]


@pytest.mark.parametrize("kwargs", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_rows_end_one_by_one(
    star: StarLLM, context: EncodedContext, kwargs: dict[str, Any]
) -> None:
    """A row that has ended keeps its own tokens, logits and reason while the others continue."""
    texts = ["The number", "The secret number is 7"]
    replies = star.generate(
        context, [QUERY, QUERY], max_new_tokens=30, **kwargs, **spell(context, *texts, then="<eos>")
    )
    eos = star.tokenizer.eos_token_id
    assert [reply.token_ids for reply in replies] == [[*ids_of(text), eos] for text in texts]
    assert [reply.text for reply in replies] == texts
    assert {reply.finish_reason for reply in replies} == {"stop"}


def test_logits_of_rows_that_end_one_by_one(star: StarLLM, context: EncodedContext) -> None:
    texts = ["The number", "The secret number is 7"]
    kwargs = spell(context, *texts, then="<eos>")
    for reply in star.generate(
        context, [QUERY, QUERY], max_new_tokens=30, return_logits=True, **kwargs
    ):
        teacher_forced = star.logits(context, ids_of(QUERY) + reply.token_ids[:-1])[
            -len(reply.token_ids) :
        ]
        torch.testing.assert_close(reply.logits, teacher_forced, atol=1e-3, rtol=1e-3)


class _AfterTokens(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_a_stopping_criterion_is_a_stop(star: StarLLM, context: EncodedContext) -> None:
    criterion = _AfterTokens(len(context) + len(ids_of(QUERY)) + 4)
    reply = star.generate(context, QUERY, stopping_criteria=StoppingCriteriaList([criterion]))
    assert (len(reply.token_ids), reply.finish_reason) == (4, "stop")


# --------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("kwargs", MODES, ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize(
    ("stop", "text", "read"),
    [
        # Inside a token, across tokens, and the first in the text rather than in the list.
        ("number", "The secret ", "number"),
        (["is 7", "nothing"], "The secret number ", "is 7"),
        ("777", "The secret number is ", "777"),
        (["secret", "The"], "", "The"),
        ("e", "Th", "e"),
    ],
)
def test_stop_strings_cut_the_text(
    star: StarLLM,
    context: EncodedContext,
    stop: Any,
    text: str,
    read: str,
    kwargs: dict[str, Any],
) -> None:
    spelled = "The secret number is 7777777"
    reply = star.generate(
        context, QUERY, stop=stop, max_new_tokens=40, **kwargs, **spell(context, spelled)
    )
    assert reply.text == text
    assert (reply.finish_reason, reply.stop_string) == ("stop", read)
    assert len(reply.token_ids) <= len(ids_of(spelled))
    assert spelled.startswith(star.tokenizer.decode(reply.token_ids))


@pytest.mark.parametrize("kwargs", MODES, ids=["greedy", "beams", "sampling"])
def test_a_stop_string_ends_the_work(
    star: StarLLM, context: EncodedContext, kwargs: dict[str, Any]
) -> None:
    """Forbids computing more: cutting the finished text alone would not end beams."""
    forwards: list[int] = []
    handle = star.model.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        star.generate(
            context,
            QUERY,
            stop="..",
            max_new_tokens=60,
            **kwargs,
            **spell(context, "The secret number"),
        )
    finally:
        handle.remove()
    assert len(forwards) <= len(ids_of("The secret number")) + (6 if "num_beams" in kwargs else 2)


@pytest.mark.parametrize("kwargs", MODES, ids=["greedy", "beams", "sampling"])
def test_stop_strings_in_a_batch(
    star: StarLLM, context: EncodedContext, kwargs: dict[str, Any]
) -> None:
    texts = ["one STOP two", "a longer one, which goes on STOP two", "no such word"]
    replies = star.generate(
        context, [QUERY] * 3, stop=" STOP", max_new_tokens=40, **kwargs, **spell(context, *texts)
    )
    assert [reply.text for reply in replies[:2]] == ["one", "a longer one, which goes on"]
    assert replies[2].text.startswith("no such word...")
    assert [reply.finish_reason for reply in replies] == ["stop", "stop", "length"]
    assert [reply.stop_string for reply in replies] == [" STOP", " STOP", None]


def test_the_beginning_of_a_stop_string_is_not_lost(star: StarLLM, context: EncodedContext) -> None:
    reply = star.generate(
        context, QUERY, stop="is 78", max_new_tokens=40, **spell(context, "It is 7", then="<eos>")
    )
    assert (reply.text, reply.finish_reason) == ("It is 7", "stop")
    assert reply.stop_string is None


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], 3])
def test_stop_strings_are_non_empty_str(star: StarLLM, context: EncodedContext, stop: Any) -> None:
    with pytest.raises(InvalidInputError, match="stop"):
        star.generate(context, QUERY, stop=stop)


def test_a_stop_string_needs_a_tokenizer(context: EncodedContext) -> None:
    star = StarLLM(text_model(), block_size=16)
    with pytest.raises(InvalidInputError, match="a stop string needs a tokenizer"):
        star.generate(star.encode([5, 6]), [7], stop="x")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_stop_text_returns_all_before_the_first_stop_string(size: int) -> None:
    """It returns the text as early as possible, for pieces of any size."""
    for text in ("abcabd", "aaab", "ababab", "xxabcab", "aabaac"):
        for stops in (["abd"], ["aab"], ["ba", "ab"], ["abc", "bc"], ["zz"], ["aaa", "c"]):
            cutter = StopStringCutter(stops)
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            returned = ""
            for index, piece in enumerate(pieces):
                returned += cutter.push(piece)
                seen = "".join(pieces[: index + 1])
                if not cutter.stopped:
                    pending = seen[len(returned) :]
                    assert not pending or any(stop.startswith(pending) for stop in stops)
            cuts = [text.find(stop) for stop in stops if stop in text]
            assert cutter.stopped == bool(cuts)
            returned += cutter.flush()
            # Of two stop strings, the one that is complete first counts.
            complete = [text.find(stop) + len(stop) for stop in stops if stop in text]
            if not cuts:
                assert returned == text
            elif size == 1:
                first = min(complete)
                assert returned == text[: min(text.find(s) for s in stops if s in text[:first])]


@pytest.mark.parametrize("kwargs", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_a_special_token_can_be_a_stop_string(
    star: StarLLM, context: EncodedContext, kwargs: dict[str, Any]
) -> None:
    """The answer's text contains no special tokens, but they end it."""
    eos = bundled_tokenizer().eos_token
    reply = star.generate(
        context,
        QUERY,
        max_new_tokens=30,
        ignore_eos=True,
        stop=eos,
        **kwargs,
        **spell(context, "The secret number is 777 Th" + eos + "e end."),
    )
    assert (reply.text, reply.finish_reason) == ("The secret number is 777 Th", "stop")


class _FirstRowAfterThree(StoppingCriteria):
    """End the first row after three tokens."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        ended[0] = input_ids.shape[1] - self.prompt_tokens >= 3
        return ended


def test_a_row_that_a_criterion_ends_has_no_padding(star: StarLLM, context: EncodedContext) -> None:
    query = [7, 8]
    ends = StoppingCriteriaList([_FirstRowAfterThree(len(context) + len(query))])
    reply = star.generate(
        context,
        query,
        num_beams=1,
        prompt_lookup_num_tokens=2,
        max_new_tokens=8,
        ignore_eos=True,
        stopping_criteria=ends,
    )
    plain = star.generate(context, query, max_new_tokens=8, ignore_eos=True)
    assert reply.finish_reason == "stop"
    assert 3 <= len(reply.token_ids) < 8
    assert reply.token_ids == plain.token_ids[: len(reply.token_ids)]
