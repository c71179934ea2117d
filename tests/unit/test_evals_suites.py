"""Samples of several tasks and lengths, made on several threads: those that one thread makes, in the same order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals import suites
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from tests.engines import bundled_tokenizer

CELLS = [
    (task, length)
    for length in (400, 700)
    for task in ("niah_single_2", "vt", "niah_multikey_2", "fwe", "cwe")
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def made(
    suite: suites.Suite, cells: list[tuple[str, int]], count: int = 3
) -> list[list[Sample] | SizeError]:
    return suites.made(
        suite, cells, tokenizer=bundled_tokenizer(), reserve=5, count=count, seed=1, options={}
    )


def test_threads_make_what_one_makes(threads: None) -> None:
    suite = suites.get("ruler")
    for (task, length), found in zip(CELLS, made(suite, CELLS), strict=True):
        size = Size(tokenizer=bundled_tokenizer(), length=length, reserve=5)
        if isinstance(found, SizeError):
            with pytest.raises(SizeError) as caught:
                list(suite.generate(task, size=size, count=3, seed=1, options={}))
            assert str(found) == str(caught.value)
        else:
            assert found == list(suite.generate(task, size=size, count=3, seed=1, options={}))
    assert {type(found) for found in made(suite, CELLS)} == {list, SizeError}


class Endless:
    """A suite of a task without an end, and of one that fails once the first is on its way."""

    TASKS = ("endless", "bad")
    OPTIONS: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.made = 0

    def generate(self, task: str, **_: Any) -> Iterator[Sample]:
        if task == "bad":
            assert self.begun.wait(60)
            raise InvalidInputError("bad data")
        while True:
            self.made += 1
            self.begun.set()
            yield Sample(
                id=str(self.made),
                task=task,
                length=0,
                context="c",
                query="q",
                answer_prefix="",
                answers=("a",),
                max_new_tokens=1,
                metric="string_match_all",
            )


def test_an_error_ends_the_other_threads(threads: None) -> None:
    suite = Endless()
    with pytest.raises(InvalidInputError, match="bad data"):
        made(suite, [("bad", 1), ("endless", 1)])
    assert suite.made > 0
