"""InfiniteBench: generated samples against answers derived from their texts; published lines."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.formats.infinitebench import sample_of
from star_attention.evals.metrics import score
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from star_attention.evals.suites.infinitebench.generate import sample_of_units
from star_attention.evals.suites.infinitebench.tasks import TASKS
from star_attention.hf.text.tokens import query_ids
from tests.engines import bundled_tokenizer

SUITE = get("infinitebench")
LENGTHS = (600, 2048)


def size(length: int) -> Size:
    return Size(tokenizer=bundled_tokenizer(), length=length)


def generate(task: str, length: int = 600, count: int = 5, seed: int = 0) -> list[Sample]:
    return list(SUITE.generate(task, size=size(length), count=count, seed=seed, options={}))


def derived_answer(sample: Sample) -> str:
    """The answer, from the texts of context and query alone."""
    body = sample.context.partition("\n\n")[2].strip()
    if sample.task == "kv_retrieval":
        (key,) = re.findall(r'"(.+)"', sample.query)
        return str(json.loads(body)[key])
    if sample.task == "math_find":
        ordered = sorted(json.loads(body))
        which = re.search(r"the (second |third )?(smallest|largest) number", sample.query)
        assert which
        rank = {None: 0, "second ": 1, "third ": 2}[which[1]]
        number = ordered[rank] if which[2] == "smallest" else ordered[-1 - rank]
        assert ordered.count(number) == 1
        return str(number)
    if sample.task == "code_run":
        names: dict[str, Any] = {}
        exec(body, names)
        (call,) = re.findall(r"func_\d+\(\d+\)", sample.query)
        return str(eval(call, names))
    numbers = set(re.findall(r"\d+", body))
    assert len(numbers) == 1
    return numbers.pop()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", SUITE.tasks)
def test_samples_fill_their_length_and_have_the_answer_that_their_text_has(
    task: str, length: int
) -> None:
    for sample in generate(task, length):
        assert length - 70 < size(length).tokens(sample) <= length
        assert sample.answers == (derived_answer(sample),)
        assert sample.answers[0] not in sample.query + sample.answer_prefix
        assert len(query_ids(bundled_tokenizer(), f" {sample.answers[0]}")) <= sample.max_new_tokens


@pytest.mark.parametrize("task", SUITE.tasks)
def test_a_sample_does_not_depend_on_how_many_are_generated(task: str) -> None:
    assert generate(task, count=2) == generate(task, count=4)[:2]
    assert generate(task)[0].context != generate(task, seed=1)[0].context
    assert (
        len(
            {
                sample.id
                for sample in [*generate(task), *generate(task, seed=1), *generate(task, 601)]
            }
        )
        == 15
    )


@pytest.mark.parametrize("task", SUITE.tasks)
def test_the_answer_scores_1_and_nothing_else_does(task: str) -> None:
    for sample, other in zip(generate(task), generate(task, seed=1), strict=True):
        assert score(f" {sample.answers[0]}", sample) == 1.0
        assert score("", sample) == score("no idea", sample) == 0.0
        assert (score(other.answers[0], sample) == 1.0) == (sample.answers == other.answers)


def test_hidden_lines_are_at_all_depths() -> None:
    depths = []
    for sample in generate("passkey", 2048, count=20):
        text = sample.context.partition("\n\n")[2]
        depths.append(100 * text.index("The pass key is") / len(text))
        assert sample.meta["depths"] == [pytest.approx(depths[-1], abs=5)]
    assert min(depths) < 20
    assert max(depths) > 80


def test_the_queried_pair_is_at_its_depth() -> None:
    for sample in generate("kv_retrieval", 2048):
        pairs = list(json.loads(sample.context.partition("\n\n")[2]).values())
        depth = 100 * pairs.index(sample.answers[0]) / (len(pairs) - 1)
        assert sample.meta["depths"] == [pytest.approx(depth, abs=0.5)]


def test_no_chain_of_functions_returns_its_argument() -> None:
    """Every draw of steps ends, also if three of them add up to 0; no question has its answer."""
    for seed in range(500):
        sample = sample_of_units("code_run", 3, random.Random(seed), id="x", length=0)
        assert sample.answers[0] not in sample.query


def test_a_number_string_is_five_digits_in_runs() -> None:
    for sample in generate("number_string"):
        (digits,) = sample.answers
        assert len(digits) == 10
        assert len(re.findall(r"(\d)\1*", digits)) <= 5


def test_short_lengths_and_unknown_tasks_are_refused() -> None:
    for task in SUITE.tasks:
        with pytest.raises(SizeError, match=f"length 20 is too short for a sample of {task}"):
            generate(task, 20)
    with pytest.raises(InvalidInputError, match="task 'math_calc' of infinitebench is unknown"):
        generate("math_calc")


# ------------------------------------------------------------------ published lines

LINES: dict[str, dict[str, Any]] = {
    "passkey": {
        "context": "c",
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": [],
    },
    "number_string": {
        "context": "c",
        "input": "What is the sequence of digits?",
        "answer": "2299446600",
        "options": [],
    },
    "kv_retrieval": {
        "context": "c",
        "input": 'Key: "a"\nThe value is: ',
        "answer": ["b-1"],
        "options": [],
    },
    "longbook_sum_eng": {"context": "c", "input": "", "answer": ["She leaves."], "options": []},
    "longbook_qa_eng": {
        "context": "c",
        "input": "Who?",
        "answer": ["The Rain", "Bronwyn Hale"],
        "options": [],
    },
    "longbook_qa_chn": {"context": "c", "input": "谁", "answer": ["王小明"], "options": []},
    "longbook_choice_eng": {
        "context": "c",
        "input": "Who?",
        "answer": ["Ann"],
        "options": ["Bo", "Cy", "Ann", "Di"],
    },
    "longdialogue_qa_eng": {"context": "c", "input": "", "answer": ["HOOPER"], "options": []},
    "code_debug": {
        "context": "c",
        "input": "",
        "answer": ["read", "B"],
        "options": ["open", "read", "x", "y"],
    },
    "code_run": {
        "context": "c",
        "input": "Return value of func_7(3)?",
        "answer": [-12],
        "options": [],
    },
    "math_find": {
        "context": "[1, 98]",
        "input": "The largest number of the list is: ",
        "answer": 98,
        "options": [],
    },
    "math_calc": {"context": "1 + 3 - 8", "input": "", "answer": [1, 4, -4], "options": []},
}
RIGHT = {
    "longbook_choice_eng": " C",
    "code_debug": " B. read",
    "code_run": "It returns -12.",
    "math_calc": "[1, 4, -4]",
    "longbook_qa_eng": "bronwyn hale",
}


def read(task: str, **changed: Any) -> Sample:
    return sample_of({**LINES[task], **changed}, task=task, id=f"{task}-0")


@pytest.mark.parametrize("task", TASKS)
def test_a_line_of_every_task_is_read_and_scored(task: str) -> None:
    sample = read(task)
    assert sample.context.endswith(f"\n\n{LINES[task]['context']}\n\n")
    assert sample.query.startswith(LINES[task]["input"].strip() or TASKS[task].question)
    assert score(RIGHT.get(task, sample.answers[0]), sample) == 1.0
    assert score("", sample) == score("nonsense", sample) == 0.0


def test_there_are_12_tasks_and_each_is_tested() -> None:
    assert len(TASKS) == 12
    assert set(LINES) == set(TASKS)


def test_the_question_is_in_the_query_alone() -> None:
    assert "func_7" not in read("code_run").context
    assert "largest" not in read("math_find").context
    assert read("math_find").answer_prefix == "", "the line has a prefix of its own"
    assert read("passkey").answer_prefix == "\nThe pass key is"
    assert read("longbook_choice_eng").query == "Who?\nA. Bo\nB. Cy\nC. Ann\nD. Di"
    assert read("longbook_choice_eng").answers == ("C", "Ann")


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("passkey", {"context": 3}, "expected context of passkey to be a string, got 3"),
        ("passkey", {"answer": None}, "answer None of passkey is empty"),
        ("kv_retrieval", {"input": " "}, "input of kv_retrieval is empty"),
        (
            "longbook_choice_eng",
            {"options": ["a", "b"]},
            r"expected options to be a list of 4 strings, got \['a', 'b'\]",
        ),
        ("longbook_choice_eng", {"answer": ["Eve"]}, "is not one of its options"),
        ("longbook_choice_eng", {"options": []}, "is not one of its options"),
    ],
)
def test_malformed_lines_are_refused(task: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(task, **changed)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match="task 'longbook' of InfiniteBench is unknown; choose from passkey"
    ):
        sample_of(LINES["passkey"], task="longbook", id="x")
