"""InfiniteBench: generated samples against answers worked out from their contexts, the published lines, and all metrics."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.metrics import score
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import infinitebench
from star_attention.hf.text.tokens import query_ids
from tests.engines import bundled_tokenizer

LENGTHS = (600, 2048)


def size(length: int) -> Size:
    return Size(tokenizer=bundled_tokenizer(), length=length)


def made(task: str, length: int = 600, count: int = 5, seed: int = 0) -> list[Sample]:
    return list(infinitebench.generate(task, size=size(length), count=count, seed=seed, options={}))


def worked_out(sample: Sample) -> str:
    """The answer, from the text of context and query alone."""
    body = sample.context.partition("\n\n")[2].strip()
    if sample.task == "kv_retrieval":
        (key,) = re.findall(r'"(.+)"', sample.query)
        return str(json.loads(body)[key])
    if sample.task == "math_find":
        ordered = sorted(json.loads(body))
        which = re.search(r"the (second |third )?(smallest|largest) number", sample.query)
        assert which
        rank = {None: 0, "second ": 1, "third ": 2}[which[1]]
        found = ordered[rank] if which[2] == "smallest" else ordered[-1 - rank]
        assert ordered.count(found) == 1
        return str(found)
    if sample.task == "code_run":
        names: dict[str, Any] = {}
        exec(body, names)
        (call,) = re.findall(r"func_\d+\(\d+\)", sample.query)
        return str(eval(call, names))
    numbers = set(re.findall(r"\d+", body))
    assert len(numbers) == 1
    return numbers.pop()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", infinitebench.TASKS)
def test_samples_fit_and_fill_their_length_and_have_the_answer_that_their_text_has(
    task: str, length: int
) -> None:
    for sample in made(task, length):
        assert length - 70 < size(length).tokens(sample) <= length
        assert sample.answers == (worked_out(sample),)
        assert sample.answers[0] not in sample.query + sample.answer_prefix
        assert len(query_ids(bundled_tokenizer(), f" {sample.answers[0]}")) <= sample.max_new_tokens


@pytest.mark.parametrize("task", infinitebench.TASKS)
def test_a_sample_is_the_same_whatever_is_made_with_it(task: str) -> None:
    assert made(task, count=2) == made(task, count=4)[:2]
    assert made(task)[0].context != made(task, seed=1)[0].context
    assert len({sample.id for sample in [*made(task), *made(task, seed=1), *made(task, 601)]}) == 15


@pytest.mark.parametrize("task", infinitebench.TASKS)
def test_the_answer_scores_1_and_nothing_else_does(task: str) -> None:
    for one, other in zip(made(task), made(task, seed=1), strict=True):
        assert score(f" {one.answers[0]}", one) == 1.0
        assert score("", one) == score("no idea", one) == 0.0
        assert (score(other.answers[0], one) == 1.0) == (one.answers == other.answers)


def test_hidden_lines_stand_at_all_depths() -> None:
    found = []
    for sample in made("passkey", 2048, count=20):
        text = sample.context.partition("\n\n")[2]
        found.append(100 * text.index("The pass key is") / len(text))
        assert sample.meta["depths"] == [pytest.approx(found[-1], abs=5)]
    assert min(found) < 20
    assert max(found) > 80


def test_the_pair_that_is_asked_for_stands_at_its_depth() -> None:
    for sample in made("kv_retrieval", 2048):
        pairs = list(json.loads(sample.context.partition("\n\n")[2]).values())
        depth = 100 * pairs.index(sample.answers[0]) / (len(pairs) - 1)
        assert sample.meta["depths"] == [pytest.approx(depth, abs=0.5)]


def test_no_chain_of_functions_returns_what_it_is_given() -> None:
    """Every draw of steps ends, also where three of them sum to 0, and the question never holds its answer."""
    for seed in range(500):
        made = infinitebench._code_run(3, random.Random(seed))
        assert made.answers[0] not in made.question


def test_a_number_string_is_five_digits_in_runs() -> None:
    for sample in made("number_string"):
        (digits,) = sample.answers
        assert len(digits) == 10
        assert len(re.findall(r"(\d)\1*", digits)) <= 5


def test_what_cannot_be_made_is_refused() -> None:
    for task in infinitebench.TASKS:
        with pytest.raises(SizeError, match=f"length 20 is too short for a sample of {task}"):
            made(task, 20)
    with pytest.raises(InvalidInputError, match="task 'math_calc' of infinitebench is unknown"):
        made("math_calc")


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
    return infinitebench.sample_of_row({**LINES[task], **changed}, task=task, id=f"{task}-0")


@pytest.mark.parametrize("task", infinitebench.KINDS)
def test_a_line_of_every_task_is_read_and_scored(task: str) -> None:
    sample = read(task)
    assert sample.context.endswith(f"\n\n{LINES[task]['context']}\n\n")
    assert sample.query.startswith(
        LINES[task]["input"].strip() or infinitebench.KINDS[task].question
    )
    assert score(RIGHT.get(task, sample.answers[0]), sample) == 1.0
    assert score("", sample) == score("nonsense", sample) == 0.0


def test_there_are_12_tasks_and_every_one_is_tried() -> None:
    assert len(infinitebench.KINDS) == 12
    assert set(LINES) == set(infinitebench.KINDS)


def test_the_question_stands_in_the_query_alone() -> None:
    assert "func_7" not in read("code_run").context
    assert "largest" not in read("math_find").context
    assert read("math_find").answer_prefix == "", "the line's own lead-in is the prefix"
    assert read("passkey").answer_prefix == "\nThe pass key is"
    assert read("longbook_choice_eng").query == "Who?\nA. Bo\nB. Cy\nC. Ann\nD. Di"
    assert read("longbook_choice_eng").answers == ("C", "Ann")


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("passkey", {"context": 3}, "context and input of passkey are no texts"),
        ("passkey", {"answer": None}, "answer None of passkey is empty"),
        ("kv_retrieval", {"input": " "}, "input of kv_retrieval is empty"),
        ("longbook_choice_eng", {"options": ["a", "b"]}, "are no list of 4 texts"),
        ("longbook_choice_eng", {"answer": ["Eve"]}, "is none of its options"),
        ("longbook_choice_eng", {"options": []}, "is none of its options"),
    ],
)
def test_malformed_lines_are_refused(task: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(task, **changed)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="task 'longbook' is none of InfiniteBench's"):
        infinitebench.sample_of_row(LINES["passkey"], task="longbook", id="x")


# ------------------------------------------------------------------ metrics


def scored(metric: str, prediction: str, *answers: str) -> float:
    sample = Sample(
        id="x",
        task="x",
        length=0,
        context="c",
        query="q",
        answer_prefix="",
        answers=answers,
        max_new_tokens=1,
        metric=metric,
    )
    return score(prediction, sample)


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"),
    [
        ("first_integer", "it is 71432, not 9", ("71432",), 1),
        ("first_integer", "9, then 71432", ("71432",), 0),
        ("first_integer", "071432", ("71432",), 0),
        ("last_integer", "func_1(2) is `7`.", ("7",), 1),
        ("last_integer", "7 or so", ("7",), 0),
        ("last_integer", "-7", ("7",), 0),
        ("last_integer", "+7", ("7",), 1),
        ("first_number", "98.0", ("98",), 1),
        ("first_number", "it is 9.5 or 98", ("98",), 0),
        ("first_number", "9.5", ("9.5",), 1),
        ("leading_integers", "[1, 4, 9, 2]", ("1", "4", "8", "2"), 0.5),
        ("leading_integers", "[1, 4]", ("1", "4", "8", "2"), 0.5),
        ("leading_integers", "[4, 1]", ("1", "4"), 0),
        ("whole_word", '{"b-1"}', ("b-1",), 1),
        ("whole_word", "b-12", ("b-1",), 0),
        ("whole_word", "B-1", ("b-1",), 0),
        ("name_word", "It is Hooper.", ("HOOPER",), 1),
        ("name_word", "Hoopers", ("HOOPER",), 0),
        ("option_letter", "B. Cy", ("B", "Cy"), 1),
        ("option_letter", "A", ("B", "Cy"), 0),
        ("option_letter", "I think the answer is: B", ("B", "Cy"), 1),
        ("option_letter", "the answer is Cy", ("B", "Cy"), 1),
        ("option_letter", "the answer is Bo", ("C", "Cy"), 0),
        ("option_letter", "it must be D, not B", ("B", "Cy"), 0),
        ("option_letter", "the answer is", ("B", "Cy"), 0),
        ("option_function", "B", ("B", "read"), 1),
        ("option_function", "B: read", ("B", "read"), 1),
        ("option_function", "The answer is: `read`", ("B", "read"), 1),
        ("option_function", "Because of read", ("B", "read"), 0),
        ("option_function", "the answer is: A", ("B", "read"), 0),
        ("token_f1", "The cat, sat!", ("a cat sat",), 1),
        ("token_f1", "cat", ("the cat sat down",), 0.5),
        ("token_f1", "dog sat", ("cat", "dog ran"), 0.5),
        ("character_f1", "王小明。", ("王小明",), 1),
        ("character_f1", "是王小明", ("王小明",), 6 / 7),
        ("character_f1", "、《A》，(b)", ("a b",), 1),  # noqa: RUF001
        ("character_f1", "李", ("王",), 0),
    ],
)
def test_metrics(metric: str, prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert scored(metric, prediction, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The cat sat on the mat.", "A cat sat down.\nOn the mat, it slept.", 0.6666666666666667),
        ("a b c d\nc d e", "a c d\nb d e f\nc", 0.9333333333333333),
        ("the the the", "the dog\nthe cat the", 0.75),
        (
            "and ran dog dog\n\ncat a dog\nran cat dog",
            "cat far cat\nmat and\nmat a and and sat far\n",
            0.28571428571428564,
        ),
        (
            "away far far dog and away\nand cat mat on and away far a\na cat and and away away and on",
            "cat and and cat and far",
            0.42857142857142855,
        ),
        ("", "x y", 0.0),
    ],
)
def test_rouge_lsum_is_that_of_rouge_score(prediction: str, answer: str, expected: float) -> None:
    """Numbers of the package rouge-score 0.1.2, without stemming."""
    assert scored("rouge_lsum", prediction, answer) == pytest.approx(expected, abs=1e-12)


def test_answers_that_are_no_numbers_are_refused_before_any_prediction_is_read() -> None:
    for metric in ("last_integer", "first_number", "leading_integers"):
        with pytest.raises(
            InvalidInputError, match=f"metric {metric} of sample x needs numbers, not seven"
        ):
            scored(metric, "", "seven")
