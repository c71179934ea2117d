"""Suites: their declarations; samples generated on several threads are those of one thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals import suites
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import PARTS
from star_attention.evals.suites.options import WORDS, SuiteOption
from star_attention.evals.suites.parallel import generate_cells
from star_attention.evals.suites.suite import Suite
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


def test_every_suite_is_declared_under_its_name() -> None:
    for name in suites.SUITES:
        suite = suites.get(name)
        assert suite.name == name
        names = [option.name for option in suite.options]
        assert len(set(names)) == len(names)
        assert f"--out {name}" in suite.example
        assert {task for option in suite.options for task in option.tasks} <= set(suite.tasks)
    with pytest.raises(InvalidInputError, match="suite 'magic' is unknown; choose one of ruler, "):
        suites.get("magic")


def test_declarations_import_no_torch() -> None:
    code = (
        "import sys; from star_attention.evals.suites import SUITES, get;"
        " [get(name) for name in SUITES]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tasks_whose_data_is_missing_are_not_available() -> None:
    suite = suites.get("ruler")
    assert set(suite.tasks) - set(suite.available_tasks({})) == {"qa_1", "qa_2"}
    assert set(suite.tasks) - set(suite.available_tasks({"hotpot": "x"})) == {"qa_1"}


def test_options_are_checked(tmp_path: Path) -> None:
    option = SuiteOption(name="file", help="", metavar="PATH", is_path=True)
    option.check({})
    option.check({"file": str(tmp_path)})
    with pytest.raises(InvalidInputError, match="file 'gone' does not exist; check the path"):
        option.check({"file": "gone"})
    option = SuiteOption(name="part", help="", metavar="PART", choices=("a", "b"))
    option.check({"part": "a"})
    option.check({"part": None})
    with pytest.raises(InvalidInputError, match="part 'c' is unknown; choose one of a, b, or leav"):
        option.check({"part": "c"})


def test_words_can_be_limited_to_each_part() -> None:
    assert WORDS.choices == PARTS


def generate(
    suite: Suite, cells: list[tuple[str, int]], count: int = 3
) -> list[list[Sample] | SizeError]:
    return generate_cells(
        suite, cells, tokenizer=bundled_tokenizer(), reserve=5, count=count, seed=1, options={}
    )


def test_several_threads_generate_what_one_does(threads: None) -> None:
    suite = suites.get("ruler")
    for (task, length), samples in zip(CELLS, generate(suite, CELLS), strict=True):
        size = Size(tokenizer=bundled_tokenizer(), length=length, reserve=5)
        if isinstance(samples, SizeError):
            with pytest.raises(SizeError) as caught:
                list(suite.generate(task, size=size, count=3, seed=1, options={}))
            assert str(samples) == str(caught.value)
        else:
            assert samples == list(suite.generate(task, size=size, count=3, seed=1, options={}))
    assert {type(samples) for samples in generate(suite, CELLS)} == {list, SizeError}


class Endless:
    """A suite with a task that never ends, and one that fails once the other has started."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.count = 0

    def generate(self, task: str, **_: Any) -> Iterator[Sample]:
        if task == "bad":
            assert self.started.wait(60)
            raise InvalidInputError("bad data")
        while True:
            self.count += 1
            self.started.set()
            yield Sample(
                id=str(self.count),
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
        generate(suite, [("bad", 1), ("endless", 1)])
    assert suite.count > 0
