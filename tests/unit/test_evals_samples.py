"""Samples: the parts that they are built from, and the search for the largest that fits."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention.errors import SizeError
from star_attention.evals.samples import sources
from star_attention.evals.samples.building import Draw, insert, opening
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size


def test_prose_starts_over_after_its_end() -> None:
    essay = sources.Prose(name="x", text=" one two\n three ", sha256="")
    assert opening(essay, 2) == "one two"
    assert opening(essay, 3) == "one two three"
    assert opening(essay, 7) == "one two three one two three one"


def test_nothing_is_drawn_twice() -> None:
    few = dataclasses.replace(sources.words(), adjectives=("red", "old"), nouns=("barn", "mill"))
    draw = Draw(random.Random(1), few)
    assert {draw("words") for _ in range(4)} == {"red-barn", "red-mill", "old-barn", "old-mill"}


def test_parts_are_inserted_at_their_places() -> None:
    assert insert(["x", "y", "z"], ["a", "b", "c"], [0, 2, 3]) == [
        "x",
        "a",
        "b",
        "y",
        "c",
        "z",
    ]
    assert insert(["x", "y"], ["a"], [1, 1]) == ["a", "x", "y"]


class Letters:
    """A tokenizer with one token per character, and one before the first."""

    bos_token_id, eos_token_id = 0, None

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [1] * len(text))


def sized(context: int) -> Sample:
    return Sample(
        id="1",
        task="vt",
        length=0,
        context="x" * context,
        query="ab",
        answer_prefix="c",
        answers=("d",),
        max_new_tokens=5,
        metric="string_match_all",
    )


def test_tokens_of_a_sample() -> None:
    assert Size(tokenizer=Letters(), length=0).tokens(sized(10)) == 1 + 10 + 3 + 5
    assert Size(tokenizer=Letters(), length=0, reserve=7).tokens(sized(10)) == 1 + 10 + 3 + 5 + 7
    bare = dataclasses.replace(sized(10), query="", answer_prefix="")
    assert Size(tokenizer=Letters(), length=0).tokens(bare) == 1 + 10 + 5


def test_the_length_itself_fits() -> None:
    assert Size(tokenizer=Letters(), length=19).fits(sized(10))
    assert not Size(tokenizer=Letters(), length=18).fits(sized(10))
    for length in range(10, 80):
        assert Size(tokenizer=Letters(), length=length).largest(sized)[0] == length - 9


def test_no_more_than_the_most_units() -> None:
    size = Size(tokenizer=Letters(), length=1009)
    for most in (1, 2, 3, 7, 999, 1000, 1001, 5000):
        count, sample = size.largest(sized, most=most)
        assert count == min(most, 1000)
        assert sample == sized(count)
    built: list[int] = []
    size.largest(lambda count: built.append(count) or sized(count), least=3, most=20)
    assert min(built) == 3
    assert max(built) == 20


def test_lengths_too_short_for_the_least_units() -> None:
    size = Size(tokenizer=Letters(), length=1019)
    assert size.largest(sized, least=1010)[0] == 1010
    with pytest.raises(
        SizeError,
        match=r"length 1,019 is too short for a sample of vt, which takes at least 1,020 tokens",
    ):
        size.largest(sized, least=1011)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=3, max_size=80), st.integers(0, 900), st.integers(1, 3)
)
def test_the_largest_is_the_one_that_trying_each_finds(
    units: list[int], room: int, least: int
) -> None:
    """It is found for units of any size, and in few steps."""

    def build(count: int) -> Sample:
        built.append(count)
        return sized(sum(units[place % len(units)] for place in range(count)))

    built: list[int] = []
    size = Size(tokenizer=Letters(), length=sum(units[:least]) + 9 + room)
    expected = least
    while size.fits(build(expected + 1)):
        expected += 1
    built = []
    assert size.largest(build, least=least) == (expected, build(expected))
    assert len(built) <= 40


def test_few_samples_are_built_for_a_long_one() -> None:
    counted: list[int] = []

    def build(count: int) -> Sample:
        counted.append(count)
        return sized(7 * count)

    assert Size(tokenizer=Letters(), length=1_000_000).largest(build)[0] == 142_855
    assert len(counted) < 25
    assert sum(counted) < 8 * 142_855


def test_few_samples_are_built_where_units_differ_much() -> None:
    """The size of a last, larger unit does not predict that of the others."""
    counted: list[int] = []

    def build(count: int) -> Sample:
        counted.append(count)
        return sized(count if count <= 1000 else 1_000_000)

    assert Size(tokenizer=Letters(), length=5000).largest(build)[0] == 1000
    assert len(counted) < 60
