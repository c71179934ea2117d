"""Metrics: RULER's official scores, InfiniteBench's rules, and ROUGE as rouge-score has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals import metrics
from star_attention.evals.samples.sample import Sample

GOLDEN = Path(__file__).parents[1] / "golden" / "ruler_scores.json"


def golden() -> list[dict[str, Any]]:
    sets: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["sets"]
    return sets


@pytest.mark.parametrize("golden_set", golden(), ids=lambda golden_set: golden_set["name"])
def test_scores_are_the_official_ones(golden_set: dict[str, Any]) -> None:
    scores = []
    for prediction, answers, (right, count) in golden_set["rows"]:
        sample = Sample(
            id="1",
            task="vt",
            length=0,
            context="",
            query="",
            answer_prefix="",
            answers=tuple(answers),
            max_new_tokens=1,
            metric=golden_set["metric"],
        )
        scores.append(metrics.score(prediction, sample))
        assert scores[-1] == pytest.approx(right / count), (prediction, answers)
    assert round(100 * sum(scores) / len(scores), 2) == golden_set["score"]


def score(metric: str, prediction: str, *answers: str) -> float:
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
    return metrics.score(prediction, sample)


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
        ("option_function", "B.", ("B", "read"), 1),
        ("option_function", "B: read", ("B", "read"), 1),
        ("option_function", "The answer is: `read`", ("B", "read"), 1),
        ("option_function", "Because of read", ("B", "read"), 0),
        ("option_function", "the answer is: A", ("B", "read"), 0),
        ("token_f1", "The cat, sat!", ("a cat sat",), 1),
        ("token_f1", "cat", ("the cat sat down",), 0.5),
        ("token_f1", "dog sat", ("cat", "dog ran"), 0.5),
        ("character_f1", "王小明。", ("王小明",), 1),
        ("character_f1", "是王小明", ("王小明",), 6 / 7),
        ("character_f1", "、A》，(b)", ("a b",), 1),  # noqa: RUF001
        ("character_f1", "李", ("王",), 0),
    ],
)
def test_metrics(metric: str, prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert score(metric, prediction, *answers) == pytest.approx(expected)


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
            "away far far dog and away\nand cat mat on and away far a\n"
            "a cat and and away away and on",
            "cat and and cat and far",
            0.42857142857142855,
        ),
        ("", "x y", 0.0),
    ],
)
def test_rouge_lsum_is_that_of_rouge_score(prediction: str, answer: str, expected: float) -> None:
    """The expected scores are those of the package rouge-score 0.1.2, without stemming."""
    assert score("rouge_lsum", prediction, answer) == pytest.approx(expected, abs=1e-12)


def test_answers_that_are_not_numbers_are_refused_for_any_prediction() -> None:
    for metric in ("last_integer", "first_number", "leading_integers"):
        with pytest.raises(
            InvalidInputError,
            match=f"metric {metric} of sample x needs numeric answers, got 'seven'",
        ):
            score(metric, "", "seven")
