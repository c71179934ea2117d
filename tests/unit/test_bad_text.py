"""Texts with half a character are refused wherever they come in; whole ones are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import star_attention
from star_attention import StarLLM
from star_attention.errors import TextError
from star_attention.hf.text.checks import checked_text
from tests.engines import bundled_tokenizer, text_model
from tests.refusals import refused

LONE = "abc \ud83d def"
PAIR = "abc \ud83d\ude00 def"


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16)


CALLS: dict[str, Callable[[StarLLM, str], Any]] = {
    "context": lambda star, text: star.encode(text),
    "context of several": lambda star, text: star.encode(["abc", text]),
    "query": lambda star, text: star.generate(star.encode("abc"), text, max_new_tokens=1),
    "query prepared": lambda star, text: star.prepare("abc", text),
    "query of several": lambda star, text: star.generate(
        star.encode("abc"), ["abc", text], max_new_tokens=1
    ),
    "query streamed": lambda star, text: list(
        star.stream(star.encode("abc"), text, max_new_tokens=1)
    ),
    "query continued": lambda star, text: star.logits(star.encode("abc"), text),
    "extension": lambda star, text: star.extend(star.encode("abc"), text),
    "stop string": lambda star, text: star.check_settings(stop=[text]),
    "answer prefix": lambda star, text: star.generate(
        star.encode("abc"), "abc", answer_prefix=text, max_new_tokens=1
    ),
    "query in a pipeline": lambda star, text: star_attention.pipeline(star)(
        "abc", question=text, chat=False, max_new_tokens=1
    ),
    "message 1 of 1": lambda star, text: star.encode([{"role": "user", "content": text}]),
    "query in a chat": lambda star, text: star.generate(
        star.encode([{"role": "user", "content": "abc\n"}]), text, max_new_tokens=1
    ),
    "extension of a chat": lambda star, text: star.extend(
        star.encode([{"role": "user", "content": "abc\n"}]), text
    ),
    "context in a pipeline": lambda star, text: star_attention.pipeline(star)(
        text, question="abc", chat=False, max_new_tokens=1
    ),
}


@pytest.mark.parametrize("place", CALLS)
def test_half_a_character(star: StarLLM, place: str) -> None:
    """Forbids the tokenizer's own TypeError, which says nothing of the text."""
    name = place.split()[0]
    refused(
        TextError,
        f"{name}",
        "has half a character, U+D83D, at offset 4 of 9",
        'text.encode("utf-8", "replace").decode()',
        call=lambda: CALLS[place](star, LONE),
    )
    # The remedy works.
    CALLS[place](star, LONE.encode("utf-8", "replace").decode())


@pytest.mark.parametrize("place", CALLS)
def test_a_pair_of_surrogates_is_its_character(star: StarLLM, place: str) -> None:
    CALLS[place](star, PAIR)


def test_pairs_have_the_characters_ids(star: StarLLM) -> None:
    whole = star.encode("abc 😀 def").token_ids.tolist()
    assert star.encode(PAIR).token_ids.tolist() == whole
    assert star.prepare("abc", PAIR).prompts == star.prepare("abc", "abc 😀 def").prompts


def test_offsets_are_the_texts_own() -> None:
    assert checked_text("\ud83d\ude00" * 3, "text") == "😀" * 3
    with pytest.raises(TextError, match=r"U\+DC80, at offset 5 of 7"):
        checked_text("😀\ud83d\ude00ab\udc80x", "text")


def test_other_characters_are_text(star: StarLLM) -> None:
    """NULs, private and unassigned characters pass as they are."""
    text = "a\x00b\ufeff\ue000\uffff\u0378c"
    ids = star.encode(text).token_ids.tolist()
    assert star.tokenizer.decode(ids, skip_special_tokens=True) == text
