"""The haystack of the demo: prose of a given length with a fact at each depth."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from star_attention.demo.haystack import Haystack, build_haystack
from star_attention.errors import (
    InvalidInputError,
    SizeError,
)
from star_attention.tools.prose import prose_lines
from tests.engines import bundled_tokenizer

LINE_TOKENS = 128
"""No line of the text is longer. Facts are within a line of their depth, texts of their length."""


def ids(text: str) -> list[int]:
    return bundled_tokenizer()(text).input_ids


def test_the_text_is_whole_lines_of_ascii_prose() -> None:
    lines = prose_lines()
    assert len(lines) > 1000
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert line.endswith("\n")
        assert line.count("\n") == 1
        assert line.isascii()
        assert line[-2] in ".!?"
        assert "secret" not in line
        assert "://" not in line
    assert max(len(ids(line)) for line in lines) <= LINE_TOKENS


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("tokens", [1024, 2048, 3001, 16384])
def test_the_length_is_never_above_the_requested_one(tokens: int, seed: int) -> None:
    haystack = build_haystack(bundled_tokenizer(), tokens, facts=10, seed=seed)
    assert haystack.tokens == len(ids(haystack.text))
    assert tokens - LINE_TOKENS < haystack.tokens <= tokens
    assert haystack.text.endswith("\n")


def test_a_tokenizer_whose_lines_do_not_add_up_gets_no_longer_text() -> None:
    """Forbids trusting the sum over lines: joined, they cost this tokenizer more."""

    class Greedy:
        bos_token_id, eos_token_id, eos_token = None, None, None

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
            count = len(text.split()) + 2 * max(0, text.count("\n") - 1)
            return type("Encoding", (), {"input_ids": list(range(3, 3 + count))})

    assert 1900 < build_haystack(Greedy(), 2000, facts=10).tokens <= 2000


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_every_fact_is_once_at_its_depth(tokens: int) -> None:
    haystack = build_haystack(bundled_tokenizer(), tokens, facts=8, seed=3)
    facts, text = haystack.facts, haystack.text
    lines = text.splitlines(keepends=True)
    assert len({fact.key for fact in facts}) == len({fact.number for fact in facts}) == 8
    assert [fact.depth for fact in facts] == [index / 7 for index in range(8)]
    assert lines[0] == facts[0].line
    assert lines[-1] == facts[-1].line
    needle = len(ids(facts[0].line))
    for fact in facts:
        assert lines.count(fact.line) == 1
        assert text.count(fact.key) == 1
        assert text.count(fact.number) == 1
        assert re.fullmatch(r"[1-9]\d{6}", fact.number)
        before = text[: text.index(fact.line)]
        assert fact.position == len(ids(before))
        assert abs(fact.position - fact.depth * haystack.tokens) < LINE_TOKENS + needle


def test_the_query_does_not_contain_the_answer() -> None:
    for fact in build_haystack(bundled_tokenizer(), 2048, seed=0).facts:
        query = fact.query(bundled_tokenizer())
        assert query.startswith("<|q|>What is the secret number for ")
        assert query.endswith(f"<|a|>The secret number for {fact.key} is")
        assert fact.number not in query
        assert fact.matches(f" {fact.number}")
        assert fact.matches(f" {fact.number}.\nMore")
        assert not fact.matches(f" {fact.number}0")
        assert not fact.matches(f" {fact.number[:-1]}")
        assert not fact.matches(f" not {fact.number}")
        assert not fact.matches("")


def test_a_tokenizer_without_the_marks_gets_a_plain_question() -> None:
    class Plain:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    fact = build_haystack(bundled_tokenizer(), 1024, facts=4).facts[0]
    assert "<|" not in fact.query(Plain())


def test_the_seed_determines_everything() -> None:
    def build(**settings: Any) -> Haystack:
        return build_haystack(bundled_tokenizer(), 2048, **settings)

    assert build(seed=5) == build(seed=5)
    other = build(seed=6)
    assert {fact.key for fact in other.facts} != {fact.key for fact in build(seed=5).facts}
    assert other.text.splitlines()[1] != build(seed=5).text.splitlines()[1]


@pytest.mark.parametrize(
    ("tokens", "facts", "message"),
    [
        (100, 10, "tokens 100 leave no room around 10 facts; give at least"),
        (2048, 1, "facts 1 cannot be planted"),
        (2048, 10**6, "facts 1000000 cannot be planted"),
        (10**6, 10, "tokens 1,000,000 are more than the text has"),
    ],
)
def test_impossible_haystacks_are_refused(tokens: int, facts: int, message: str) -> None:
    with pytest.raises(SizeError, match=message):
        build_haystack(bundled_tokenizer(), tokens, facts=facts)


@pytest.mark.parametrize("facts", [5, 30])
def test_the_length_that_the_message_asks_for_suffices(facts: int) -> None:
    """Forbids a minimum that holds only for the facts drawn for this length."""
    with pytest.raises(SizeError, match=r"leave no room") as refused:
        build_haystack(bundled_tokenizer(), 100, facts=facts)
    least = int(str(refused.value).rpartition("give at least ")[2].replace(",", ""))
    for tokens in range(least, least + 8):
        assert (
            build_haystack(bundled_tokenizer(), tokens, facts=facts, seed=tokens).tokens <= tokens
        )


def test_a_python_without_the_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    prose_lines.cache_clear()
    with pytest.raises(
        InvalidInputError, match=r"pydoc_data\.topics of the standard library, is missing"
    ):
        prose_lines()
