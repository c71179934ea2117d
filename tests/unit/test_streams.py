"""Streams: pieces of whole characters, the same as `generate`, never disturbed by other calls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text.detokenizer import Detokenizer
from tests.engines import bundled_tokenizer, text_model
from tests.spelling import CONTEXT, QUERY, ids_of, spell

# Letters, accents, characters of two, three and four bytes, joined emoji, right-to-left text, lone
# combining marks.
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


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=16)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode(CONTEXT)
    return context


# --------------------------------------------------------------------------------------- characters


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


def test_an_answer_that_ends_inside_a_character_shows_it() -> None:
    detokenizer = Detokenizer(bundled_tokenizer())
    token_ids = ids_of("日")[:-1]
    assert len(token_ids) >= 1
    assert [detokenizer.push(token) for token in token_ids] == [""] * len(token_ids)
    assert set(detokenizer.flush()) == {"\ufffd"}


@pytest.mark.parametrize("stop", [None, "END", "。"])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_generate(
    star: StarLLM, context: EncodedContext, text: str, stop: str | None
) -> None:
    text += "END" if stop == "END" else ""
    kwargs: dict[str, Any] = dict(
        max_new_tokens=len(ids_of(text)) + 1, stop=stop, **spell(context, text, then="<eos>")
    )
    reply = star.generate(context, QUERY, **kwargs)
    stream = star.stream(context, QUERY, **kwargs)
    pieces = list(stream)
    assert "".join(pieces) == reply.text == stream.result.text == text.partition(stop or "\0")[0]
    assert all(pieces)
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text
    assert stream.result.token_ids == reply.token_ids
    assert stream.result.finish_reason == reply.finish_reason == "stop"


# ------------------------------------------------------------------------------------------ streams


def test_a_stream_comes_piece_by_piece(star: StarLLM, context: EncodedContext) -> None:
    """The first piece arrives before the second token is computed."""
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
    received = "".join(itertools.islice(stream, 3))
    with pytest.raises(InvalidInputError, match="the stream has not ended"):
        _ = stream.result
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "length"
    assert 3 <= len(stream.result.token_ids) < 20
    assert whole.token_ids[: len(stream.result.token_ids)] == stream.result.token_ids
    assert stream.result.text.startswith(received)
    assert whole.text.startswith(stream.result.text)


def test_a_stream_that_never_began_has_an_empty_result(
    star: StarLLM, context: EncodedContext
) -> None:
    with star.stream(context, QUERY, return_logits=True) as stream:
        pass
    assert (stream.result.text, stream.result.token_ids) == ("", [])


def test_a_suspended_stream_is_not_disturbed(star: StarLLM, context: EncodedContext) -> None:
    """Answers, encoding, other streams and the plain model may run between two pieces."""
    kwargs: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=12)
    sampling = kwargs | dict(do_sample=True, temperature=2.0)
    expected = star.generate(context, QUERY, **kwargs).text
    sampled = [star.generate(context, QUERY, seed=seed, **sampling).text for seed in (1, 2)]
    plain_ids = torch.tensor([context.token_ids.tolist() + ids_of(QUERY)])
    plain_kwargs: dict[str, Any] = dict(
        attention_mask=torch.ones_like(plain_ids), max_new_tokens=6, pad_token_id=0
    )
    plain = star.model.generate(plain_ids, **plain_kwargs)

    streams = [star.stream(context, QUERY, **kwargs)]
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
        assert star.generate(context, QUERY, **kwargs).text == expected
        assert torch.equal(star.model.generate(plain_ids, **plain_kwargs), plain)
    assert texts == [expected, *sampled]


def test_a_stream_is_one_answer_of_text(star: StarLLM, context: EncodedContext) -> None:
    with pytest.raises(InvalidInputError, match="a stream answers one query, got 2"):
        star.stream(context, [QUERY, QUERY])
    for kwargs in (dict(num_beams=2), dict(do_sample=True, num_return_sequences=2)):
        with pytest.raises(
            InvalidInputError, match="a stream is one answer by greedy search or sampling"
        ):
            star.stream(context, QUERY, **kwargs)
    with pytest.raises(InvalidInputError, match="a stream of text needs a tokenizer"):
        StarLLM(star.model).stream(context, [5])
