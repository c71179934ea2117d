"""Passages: sentences and lines between tokens, and where their text is."""

from __future__ import annotations

from typing import Any

import pytest

from star_attention.hf.text import passages
from star_attention.hf.text.chat import open_context
from star_attention.hf.text.passages import Place
from tests.conversations import TEMPLATES, tokenizer_with
from tests.engines import bundled_tokenizer
from tests.tokenizers_by_family import FAMILIES, MORE_FAMILIES, tokenizer_of

TEXT = (
    "The cat sat. The dog ran!\nA line without an end\n\n  Pi is 3.14, says Dr. Smith (of"
    ' \u00dcbersee). "Who?" "I." \u732b\u304c\u3044\u308b\u3002\u72ac\u3082\u3044\u308b\u3002'
    " \U0001f408\U0001f415 Done \u2026 yes."
)


def texts(tokenizer: Any, text: str) -> list[Place]:
    ids = tokenizer(text).input_ids
    return passages.places(tokenizer, ids, passages.passages(tokenizer, ids), text)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"unigram"}))
def test_characters_are_those_of_the_text(family: str) -> None:
    """Forbids offsets of a text with a dummy space, and passages that cut a character."""
    found = texts(tokenizer_of(family), TEXT)
    assert len(found) > 3
    last = 0
    for place in found:
        assert place.start_char is not None
        assert place.stop_char is not None
        assert TEXT[place.start_char : place.stop_char] == place.text == place.text.strip() != ""
        assert TEXT[last : place.start_char].strip() == "", "nothing is left out"
        last = place.stop_char
    assert TEXT[last:].strip() == ""


def test_sentences_and_lines() -> None:
    text = "The cat sat on it. The dog ran.\nNo end here\n\n  Pi is 3.14 or so. So\n"
    assert [place.text for place in texts(bundled_tokenizer(), text)] == [
        "The cat sat on it.",
        "The dog ran.",
        "No end here",
        "Pi is 3.14 or so.",
        "So",
    ]


@pytest.mark.parametrize("text", ["word " * 500, "\U0001f408" * 300, "x" * 900])
def test_a_text_without_ends_is_cut_between_words_or_characters(text: str) -> None:
    found = texts(bundled_tokenizer(), text)
    assert len(found) > 2
    assert "".join(place.text for place in found) == text.replace(" ", "").strip() or all(
        set(place.text.split()) == {"word"} for place in found
    )


def test_control_tokens_are_in_no_passage() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer("The cat.<|q|>The dog").input_ids
    spans = passages.passages(tokenizer, ids)
    control = set(tokenizer.all_special_ids)
    assert not any(control & set(ids[start:stop]) for start, stop in spans)
    assert [tokenizer.decode(ids[start:stop]) for start, stop in spans] == ["The cat.", "The dog"]


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_of_a_text_that_the_tokenizer_changes_characters_are_right_or_none(family: str) -> None:
    """Forbids offsets that point elsewhere: lower case, unknown letters, white space joined."""
    text = "The  cafe\u0301 is \u732b. It is RED.\n\n\nThe cat sat on it. So. The cat sat on it.\n"
    found = texts(tokenizer_of(family), text)
    assert found
    for place in found:
        if place.start_char is not None:
            assert text[place.start_char : place.stop_char] == place.text


def test_without_a_text_there_are_no_characters() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer("The cat sat on it.").input_ids
    spans = passages.passages(tokenizer, ids)
    assert passages.places(tokenizer, ids, spans, None) == [Place(text="The cat sat on it.")]
    changed = "the cat sat. The cat sat on it."
    (place,) = passages.places(tokenizer, ids, spans, changed)
    assert (place.start_char, place.stop_char) == (13, 31)
    assert passages.places(tokenizer, ids, spans, 2 * changed) == [Place(text="The cat sat on it.")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_characters_of_a_chat_are_those_of_its_messages(name: str) -> None:
    """Forbids offsets in the rendered text, and short messages that are found in longer ones."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = [
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "The cat is a user of the mat."},
        {
            "role": "user",
            "content": "  The dog is a user of the mat. The cat ran.\nSo did the dog.\n",
        },
    ]
    opened = open_context(tokenizer, messages)
    ids = tokenizer(opened.head, add_special_tokens=False).input_ids
    spans = passages.passages(tokenizer, ids)
    found = passages.chat_places(tokenizer, ids, spans, opened.messages, "")
    own = [place for place in found if place.message is not None]
    assert {place.message for place in own} >= {1, 2}
    for place in own:
        content = messages[place.message or 0]["content"]
        assert content[place.start_char : place.stop_char] == place.text
    assert "The dog is a user of the mat." in [p.text for p in own if p.message == 2]


def test_without_a_tokenizer_they_are_short_runs() -> None:
    assert passages.passages(None, list(range(70))) == [(0, 32), (32, 64), (64, 70)]
