"""Several questions on one context: the same text with an answer for each; SCBench's lines."""

from __future__ import annotations

import json
import re
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.formats import scbench
from star_attention.evals.metrics import METRICS, score
from star_attention.evals.samples import sources
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from tests.engines import bundled_tokenizer

SUITE = get("shared")
LENGTHS = (1200, 2048)


def size(length: int) -> Size:
    return Size(tokenizer=bundled_tokenizer(), length=length)


def generate(
    task: str, length: int = 1200, count: int = 7, seed: int = 0, **options: Any
) -> list[Sample]:
    return list(
        SUITE.generate(
            task, size=size(length), count=count, seed=seed, options={"questions": 3} | options
        )
    )


def derived_answer(sample: Sample) -> str:
    """The answer, from the texts of context and query alone."""
    if sample.task == "shared_kv":
        (key,) = re.findall(r'"(.+)"', sample.query)
        return str(json.loads(sample.context.partition("\n\n")[2])[key])
    (key,) = re.findall(r"magic number for (\S+) mentioned", sample.query)
    (value,) = re.findall(
        rf"One of the special magic numbers for {key} is: (\d+)\.", sample.context
    )
    return str(value)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", SUITE.tasks)
def test_samples_fit_and_their_context_has_their_answer(task: str, length: int) -> None:
    samples = generate(task, length)
    for sample in samples:
        assert length - 120 < size(length).tokens(sample) <= length
        assert sample.answers == (derived_answer(sample),)
        assert sample.answers[0] not in sample.query + sample.answer_prefix
        assert score(f" {sample.answers[0]}", sample) == 1.0
        assert score("", sample) == 0.0
    for sample, other in pairwise(samples):
        assert score(other.answers[0], sample) == 0.0


@pytest.mark.parametrize("task", SUITE.tasks)
def test_samples_of_one_context_follow_each_other(task: str) -> None:
    samples = generate(task)
    runs = [
        (context, len(list(run))) for context, run in groupby(sample.context for sample in samples)
    ]
    assert [number for _, number in runs] == [3, 3, 1]
    assert len({context for context, _ in runs}) == 3
    assert len({sample.query for sample in samples}) == 7
    assert [sample.meta["context"] for sample in samples] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("task", SUITE.tasks)
def test_a_sample_does_not_depend_on_how_many_are_generated(task: str) -> None:
    assert generate(task, count=4) == generate(task, count=7)[:4]
    assert generate(task)[0].context != generate(task, seed=1)[0].context
    assert (
        len(
            {
                sample.id
                for sample in [*generate(task), *generate(task, seed=1), *generate(task, 1201)]
            }
        )
        == 21
    )


def test_there_are_ten_questions_by_default() -> None:
    samples = list(SUITE.generate("shared_kv", size=size(2048), count=11, seed=0, options={}))
    assert len({sample.context for sample in samples[:10]}) == 1
    assert samples[10].context != samples[9].context


def test_needles_are_hidden_in_the_essays(tmp_path: Path) -> None:
    text = tmp_path / "essay.txt"
    text.write_text("It rained all day. The sun came out.")
    sample = generate("shared_niah", essays=str(text))[0]
    assert sample.context.count("The sun came out.") > 20
    assert sample.meta["prose"] == "essay.txt"


def test_keys_consist_of_the_requested_words() -> None:
    """A model can be tested with words that it was not trained on."""
    held_out = sources.words("eval")
    for sample in generate("shared_niah", words="eval"):
        (key,) = re.findall(r"magic number for (\S+) mentioned", sample.query)
        assert key in {
            f"{adjective}-{noun}" for adjective in held_out.adjectives for noun in held_out.nouns
        }
        assert sample.meta["words"] == held_out.release
    assert generate("shared_niah")[0].meta["words"] == sources.words().release
    with pytest.raises(InvalidInputError, match="words 'test' is unknown"):
        generate("shared_niah", words="test")


@pytest.mark.parametrize("questions", [0, -1, "many", 1.5, None])
def test_numbers_of_questions_below_1_or_not_whole_are_refused(questions: Any) -> None:
    with pytest.raises(InvalidInputError, match="is not a positive integer"):
        generate("shared_kv", questions=questions)


def test_short_lengths_and_unknown_tasks_are_refused() -> None:
    with pytest.raises(SizeError, match="too short for a sample of shared_kv"):
        generate("shared_kv", 200)
    with pytest.raises(InvalidInputError, match="task 'shared' of shared is unknown"):
        generate("shared")


# ------------------------------------------------------------------ SCBench

TURNS: list[dict[str, Any]] = [
    {"input": "Value of a?", "answer": "1-x"},
    {"input": "The value of b is: ", "answer": ["2-y"]},
]


def read(task: str, *turns: dict[str, Any], **changed: Any) -> list[Sample]:
    row = {"id": 5, "context": "c", "multi_turns": list(turns)} | changed
    return scbench.samples_of(row, task=task, id="5")


def test_every_turn_is_a_question_on_the_same_context() -> None:
    first, second = read("scbench_kv", *TURNS)
    assert first.context == second.context == "c\n\n"
    assert (first.id, second.id) == ("5-0", "5-1")
    assert (first.query, first.answer_prefix, first.answers) == (
        "Value of a?",
        "\nAnswer:",
        ("1-x",),
    )
    assert (second.query, second.answer_prefix, second.answers) == (
        "The value of b is: ",
        "",
        ("2-y",),
    )
    assert (first.metric, first.max_new_tokens) == ("contains", 150)
    assert read("mine", *TURNS)[0].metric == "string_match_all"


def test_options_and_mixed_tasks() -> None:
    turn = {"input": "Who?", "answer": "Cy", "options": ["Bo", "Cy", "Di", "Ed"]}
    (sample,) = read("scbench_choice_eng", turn)
    assert sample.query == "Who?\nA. Bo\nB. Cy\nC. Di\nD. Ed"
    assert score(" B", sample) == 1.0
    assert score(" C", sample) == 0.0
    (sample,) = read(
        "scbench_summary_with_needles", {"input": "q", "answer": "12", "task": "scbench_passkey"}
    )
    assert (sample.task, sample.metric) == ("scbench_passkey", "first_integer")


def test_the_metric_of_every_task_exists() -> None:
    assert {metric for metric, _ in scbench.TASKS.values()} <= set(METRICS)


@pytest.mark.parametrize(
    ("task", "turns", "changed", "message"),
    [
        ("scbench_repoqa", TURNS, {}, "task 'scbench_repoqa' of SCBench has no metric here"),
        ("mine", TURNS, {"context": None}, "expected context to be a string, got None"),
        ("mine", [], {}, r"expected multi_turns to be a list of questions, got \[\]"),
        ("mine", TURNS, {"multi_turns": ["q"]}, "expected multi_turns to be a list of questions"),
        (
            "mine",
            [{"input": "", "answer": "x"}],
            {},
            "expected input of a turn to be a question, got ''",
        ),
        ("mine", [{"input": "q", "answer": []}], {}, "answer .* of a turn is empty"),
        (
            "mine",
            [{"input": "q", "answer": "x", "options": ["x"]}],
            {},
            "expected options to be a list of 4 strings",
        ),
    ],
)
def test_malformed_lines_are_refused(
    task: str, turns: list[dict[str, Any]], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(task, *turns, **changed)
