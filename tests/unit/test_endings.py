"""How answers end and how they are read: end-of-sequence tokens, stop strings, streams, whole characters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text.tokens import Detokenizer, StopText
from tests.engines import bundled_tokenizer, text_model

# Letters, accents, signs of two, three and four bytes, joined emoji, right-to-left, lone combining marks.
TEXTS = [
    "The secret number is 4910508.",
    "naïve café — Größe",
    "日本語のテキスト、漢字。",
    "ok 👍🏽 family 👩‍👩‍👧‍👦 flag 🇨🇭 end",
    "mixed: añb日c👍d",
    "שלום، مرحبا",
    "e\u0301 a\u0308 \u0301",
    "\ufffd a real replacement character",
    "  spaces  and\n\n\tlines \n",
]
CONTEXT = "Stars come out one after another.\nThe secret number for petal-signature is 5335582.\n"
QUERY = "<|q|>What is the secret number for petal-signature?<|a|>"


class _Say(LogitsProcessor):
    """Makes the answers of a batch spell given ids, a row each; then whatever `then` is, for ever."""

    def __init__(self, prompt_tokens: int, answers: list[list[int]], then: int) -> None:
        self.prompt_tokens, self.answers, self.then = prompt_tokens, answers, then

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self.prompt_tokens
        forced = torch.full_like(scores, -1e4)
        rows = input_ids.shape[0] // len(self.answers)
        for row in range(input_ids.shape[0]):
            answer = self.answers[row // rows]
            forced[row, answer[at] if at < len(answer) else self.then] = 0.0
        return forced


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=16)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode(CONTEXT)
    return context


def ids_of(text: str) -> list[int]:
    return bundled_tokenizer()(text, add_special_tokens=False).input_ids


Saying = Callable[..., dict[str, Any]]


@pytest.fixture
def saying(star: StarLLM, context: EncodedContext) -> Saying:
    """Words for `generate` with QUERY that make the answers spell texts (a full stop for ever behind them)."""

    def words(*texts: str, then: str = ".") -> dict[str, Any]:
        prompt = len(context) + len(ids_of(QUERY))
        [last] = ids_of(then) if then != "<eos>" else [bundled_tokenizer().eos_token_id]
        say = _Say(prompt, [ids_of(text) for text in texts], last)
        return dict(logits_processor=LogitsProcessorList([say]))

    return words


# ------------------------------------------------------------------------------------------------------- finish_reason


def test_an_answer_ends_with_eos(star: StarLLM, context: EncodedContext, saying: Saying) -> None:
    reply = star.generate(context, QUERY, **saying("5335582", then="<eos>"))
    assert reply.finish_reason == "stop"
    assert reply.token_ids == [*ids_of("5335582"), star.tokenizer.eos_token_id]
    assert str(reply) == reply.text == "5335582"


@pytest.mark.parametrize("words", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_ignore_eos_goes_on(
    star: StarLLM, context: EncodedContext, words: dict[str, Any], saying: Saying
) -> None:
    reply = star.generate(
        context, QUERY, max_new_tokens=20, ignore_eos=True, **words, **saying("7", then="<eos>")
    )
    assert reply.token_ids == [*ids_of("7"), *[star.tokenizer.eos_token_id] * 19]
    assert (reply.text, reply.finish_reason) == ("7", "length")


@pytest.mark.parametrize("max_new_tokens", [1, 3])
def test_length_ends_an_answer(star: StarLLM, context: EncodedContext, max_new_tokens: int) -> None:
    reply = star.generate(context, QUERY, max_new_tokens=max_new_tokens)
    assert len(reply.token_ids) == max_new_tokens
    assert reply.finish_reason == "length"


def test_eos_as_the_last_possible_token_is_a_stop(
    star: StarLLM, context: EncodedContext, saying: Saying
) -> None:
    reply = star.generate(context, QUERY, max_new_tokens=1, **saying("", then="<eos>"))
    assert (reply.finish_reason, reply.text) == ("stop", "")


def test_eos_tokens_of_the_call_count(
    star: StarLLM, context: EncodedContext, saying: Saying
) -> None:
    [dot, seven] = ids_of(".7")
    reply = star.generate(
        context, QUERY, max_new_tokens=9, eos_token_id=[seven, dot], **saying("The number")
    )
    assert reply.finish_reason == "stop"
    assert reply.token_ids == [*ids_of("The number"), dot]


@pytest.mark.parametrize("words", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_rows_end_one_by_one(
    star: StarLLM, context: EncodedContext, words: dict[str, Any], saying: Saying
) -> None:
    """A row that has ended keeps its own tokens, logits and reason while the others go on."""
    texts = ["The number", "The secret number is 7"]
    replies = star.generate(
        context, [QUERY, QUERY], max_new_tokens=30, **words, **saying(*texts, then="<eos>")
    )
    eos = star.tokenizer.eos_token_id
    assert [reply.token_ids for reply in replies] == [[*ids_of(text), eos] for text in texts]
    assert [reply.text for reply in replies] == texts
    assert {reply.finish_reason for reply in replies} == {"stop"}


def test_logits_of_rows_that_end_one_by_one(
    star: StarLLM, context: EncodedContext, saying: Saying
) -> None:
    texts = ["The number", "The secret number is 7"]
    words = saying(*texts, then="<eos>")
    for reply in star.generate(
        context, [QUERY, QUERY], max_new_tokens=30, return_logits=True, **words
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


# ------------------------------------------------------------------------------------------------------------- stop


MODES = [{}, dict(num_beams=2), dict(do_sample=True, seed=1)]


@pytest.mark.parametrize("words", MODES, ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("number", "The secret "),  # inside the text, whatever the tokens
        (["is 7", "nothing"], "The secret number "),  # across tokens
        ("777", "The secret number is "),
        (["secret", "The"], ""),  # the first in the text, not in the list
        ("e", "Th"),
    ],
)
def test_stop_strings_cut_the_text(
    star: StarLLM,
    context: EncodedContext,
    stop: Any,
    text: str,
    words: dict[str, Any],
    saying: Saying,
) -> None:
    said = "The secret number is 7777777"
    reply = star.generate(context, QUERY, stop=stop, max_new_tokens=40, **words, **saying(said))
    assert reply.text == text
    assert reply.finish_reason == "stop"
    assert len(reply.token_ids) <= len(ids_of(said))
    assert said.startswith(star.tokenizer.decode(reply.token_ids))


@pytest.mark.parametrize("words", MODES, ids=["greedy", "beams", "sampling"])
def test_a_stop_string_ends_the_work(
    star: StarLLM, context: EncodedContext, words: dict[str, Any], saying: Saying
) -> None:
    """Nothing is computed behind it (a cut of the finished text alone would not end beams)."""
    forwards: list[int] = []
    handle = star.model.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        star.generate(
            context, QUERY, stop="..", max_new_tokens=60, **words, **saying("The secret number")
        )
    finally:
        handle.remove()
    assert len(forwards) <= len(ids_of("The secret number")) + (6 if "num_beams" in words else 2)


@pytest.mark.parametrize("words", MODES, ids=["greedy", "beams", "sampling"])
def test_stop_strings_in_a_batch(
    star: StarLLM, context: EncodedContext, words: dict[str, Any], saying: Saying
) -> None:
    texts = ["one STOP two", "a longer one, which goes on STOP two", "no such word"]
    replies = star.generate(
        context, [QUERY] * 3, stop=" STOP", max_new_tokens=40, **words, **saying(*texts)
    )
    assert [reply.text for reply in replies[:2]] == ["one", "a longer one, which goes on"]
    assert replies[2].text.startswith("no such word...")
    assert [reply.finish_reason for reply in replies] == ["stop", "stop", "length"]


def test_what_only_begins_a_stop_string_is_given_back(
    star: StarLLM, context: EncodedContext, saying: Saying
) -> None:
    reply = star.generate(
        context, QUERY, stop="is 78", max_new_tokens=40, **saying("It is 7", then="<eos>")
    )
    assert (reply.text, reply.finish_reason) == ("It is 7", "stop")


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], 3])
def test_stop_strings_are_texts(star: StarLLM, context: EncodedContext, stop: Any) -> None:
    with pytest.raises(InvalidInputError, match="stop"):
        star.generate(context, QUERY, stop=stop)


def test_a_stop_string_needs_a_tokenizer(context: EncodedContext) -> None:
    star = StarLLM(text_model(), block_size=16)
    with pytest.raises(InvalidInputError, match="a stop string needs a tokenizer"):
        star.generate(star.encode([5, 6]), [7], stop="x")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_stop_text_returns_all_before_the_first_stop_string(size: int) -> None:
    """Whatever the pieces, and as early as it can be certain."""
    for text in ("abcabd", "aaab", "ababab", "xxabcab", "aabaac"):
        for stops in (["abd"], ["aab"], ["ba", "ab"], ["abc", "bc"], ["zz"], ["aaa", "c"]):
            cutter = StopText(stops)
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            got = ""
            for index, piece in enumerate(pieces):
                got += cutter.push(piece)
                seen = "".join(pieces[: index + 1])
                if not cutter.stopped:
                    held = seen[len(got) :]
                    assert not held or any(stop.startswith(held) for stop in stops)
            cuts = [text.find(stop) for stop in stops if stop in text]
            assert cutter.stopped == bool(cuts)
            got += cutter.flush()
            # Of two stop strings the one that is complete first counts.
            complete = [text.find(stop) + len(stop) for stop in stops if stop in text]
            if not cuts:
                assert got == text
            elif size == 1:
                first = min(complete)
                assert got == text[: min(text.find(s) for s in stops if s in text[:first])]


# ----------------------------------------------------------------------------------------------------------- characters


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    tokenizer = bundled_tokenizer()
    token_ids = ids_of(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in token_ids]
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids) == text


def test_the_texts_have_characters_of_several_tokens() -> None:
    assert sum(len(ids_of(text)) > len(text) for text in TEXTS) >= 3


def test_an_answer_that_ends_inside_a_character_says_so() -> None:
    detokenizer = Detokenizer(bundled_tokenizer())
    token_ids = ids_of("日")[:-1]
    assert len(token_ids) >= 1
    assert [detokenizer.push(token) for token in token_ids] == [""] * len(token_ids)
    assert set(detokenizer.flush()) == {"\ufffd"}


@pytest.mark.parametrize("stop", [None, "END", "。"])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_generate(
    star: StarLLM, context: EncodedContext, text: str, stop: str | None, saying: Saying
) -> None:
    text += "END" if stop == "END" else ""
    words: dict[str, Any] = dict(
        max_new_tokens=len(ids_of(text)) + 1, stop=stop, **saying(text, then="<eos>")
    )
    reply = star.generate(context, QUERY, **words)
    stream = star.stream(context, QUERY, **words)
    pieces = list(stream)
    assert "".join(pieces) == reply.text == stream.result.text == text.partition(stop or "\0")[0]
    assert all(pieces)
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text
    assert stream.result.token_ids == reply.token_ids
    assert stream.result.finish_reason == reply.finish_reason == "stop"


# -------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_comes_piece_by_piece(star: StarLLM, context: EncodedContext) -> None:
    """The first piece is there before the second token is computed."""
    forwards: list[int] = []
    handle = star.model.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        stream = star.stream(context, QUERY, ignore_eos=True, max_new_tokens=20)
        assert forwards == []
        next(stream)
        assert len(forwards) <= 2
        list(stream)
        assert len(forwards) == 20
    finally:
        handle.remove()


def test_a_stream_can_be_closed_early(star: StarLLM, context: EncodedContext) -> None:
    whole = star.generate(context, QUERY, ignore_eos=True, max_new_tokens=20)
    stream = star.stream(context, QUERY, ignore_eos=True, max_new_tokens=20)
    got = "".join(itertools.islice(stream, 3))
    with pytest.raises(InvalidInputError, match="the stream has not ended"):
        _ = stream.result
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "length"
    assert 3 <= len(stream.result.token_ids) < 20
    assert whole.token_ids[: len(stream.result.token_ids)] == stream.result.token_ids
    assert stream.result.text.startswith(got)
    assert whole.text.startswith(stream.result.text)


def test_a_stream_that_never_began_has_an_empty_result(
    star: StarLLM, context: EncodedContext
) -> None:
    with star.stream(context, QUERY, return_logits=True) as stream:
        pass
    assert (stream.result.text, stream.result.token_ids) == ("", [])


def test_a_suspended_stream_is_not_disturbed(star: StarLLM, context: EncodedContext) -> None:
    """Between two pieces anything may run on the same model: answers, encoding, other streams, the plain model."""
    words: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=12)
    sampling = words | dict(do_sample=True, temperature=2.0)
    expected = star.generate(context, QUERY, **words).text
    sampled = [star.generate(context, QUERY, seed=seed, **sampling).text for seed in (1, 2)]
    plain_ids = torch.tensor([context.token_ids.tolist() + ids_of(QUERY)])
    plain_words: dict[str, Any] = dict(
        attention_mask=torch.ones_like(plain_ids), max_new_tokens=6, pad_token_id=0
    )
    plain = star.model.generate(plain_ids, **plain_words)

    streams = [star.stream(context, QUERY, **words)]
    streams += [star.stream(context, QUERY, seed=seed, **sampling) for seed in (1, 2)]
    texts = ["", "", ""]
    alive = True
    while alive:
        alive = False
        for index, stream in enumerate(streams):
            piece = next(stream, None)
            if piece is not None:
                texts[index] += piece
                alive = True
        star.encode(CONTEXT * 2)
        assert star.generate(context, QUERY, **words).text == expected
        assert torch.equal(star.model.generate(plain_ids, **plain_words), plain)
    assert texts == [expected, *sampled]


def test_a_stream_is_one_answer_of_text(star: StarLLM, context: EncodedContext) -> None:
    with pytest.raises(InvalidInputError, match="a stream answers one query, got 2"):
        star.stream(context, [QUERY, QUERY])
    for words in (dict(num_beams=2), dict(do_sample=True, num_return_sequences=2)):
        with pytest.raises(
            InvalidInputError, match="a stream is one answer by greedy search or sampling"
        ):
            star.stream(context, QUERY, **words)
    with pytest.raises(InvalidInputError, match="a stream of text needs a tokenizer"):
        StarLLM(star.model).stream(context, [5])


@pytest.mark.parametrize("words", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_a_special_token_can_be_a_stop_string(
    star: StarLLM, context: EncodedContext, words: dict[str, Any], saying: Saying
) -> None:
    """The answer's text leaves special tokens out, but they end it all the same."""
    eos = bundled_tokenizer().eos_token
    reply = star.generate(
        context,
        QUERY,
        max_new_tokens=30,
        ignore_eos=True,
        stop=eos,
        **words,
        **saying("The secret number is 777 Th" + eos + "e end."),
    )
    assert (reply.text, reply.finish_reason) == ("The secret number is 777 Th", "stop")


class AfterThree(StoppingCriteria):
    """Ends the first row after three tokens."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        ended[0] = input_ids.shape[1] - self.prompt_tokens >= 3
        return ended


def test_a_row_that_a_criterion_ends_in_beams_has_no_fill(
    star: StarLLM, context: EncodedContext
) -> None:
    query = [7, 8]
    ends = StoppingCriteriaList([AfterThree(len(context) + len(query))])
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
