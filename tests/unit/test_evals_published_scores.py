"""Scores of published tasks on made-up answers: what the authors' own code says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals import metrics
from star_attention.evals.formats.files import read
from star_attention.evals.formats.infinitebench import sample_of
from star_attention.evals.metrics.babilong import LABELS
from star_attention.evals.samples.sample import Sample
from star_attention.evals.suites import get
from tests.jsonl import write_lines


def score(metric: str, prediction: str, *answers: str, task: str = "x", query: str = "q") -> float:
    sample = Sample(
        id="x",
        task=task,
        length=0,
        context="c",
        query=query,
        answer_prefix="",
        answers=answers,
        max_new_tokens=1,
        metric=metric,
    )
    return metrics.score(prediction, sample)


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "published"),
    [
        ("option_letter", " Walking Georgie", ("A", "Walking Georgie"), 1),
        ("option_letter", "Snowfield", ("C", "Snowfield"), 1),
        ("option_letter", "Snowfield.", ("C", "Snowfield"), 0),
        ("option_letter", "Option C, Snowfield", ("C", "Snowfield"), 1),
        ("option_letter", "The answer is: Snowfield", ("C", "Snowfield"), 1),
        ("option_letter", "the answer is C", ("C", "Snowfield"), 1),
        ("option_letter", "answer:C", ("C", "Snowfield"), 0),
        ("option_letter", "AB or C", ("C", "Snowfield"), 0),
        ("option_letter", "It is AB, no, C", ("C", "Snowfield"), 0),
        ("option_letter", "Cats", ("C", "Snowfield"), 1),
        ("option_letter", "the option is Snow", ("C", "Snowfield"), 0),
        ("option_letter", "I say A", ("C", "A"), 1),
        ("option_letter", "A", ("C", "A"), 1),
        ("option_function", "B", ("B", "read"), 0),
        ("option_function", " B. read", ("B", "read"), 1),
        ("option_function", "B: read", ("B", "read"), 1),
        ("option_function", "read", ("B", "read"), 0),
        ("option_function", "The correct option is: B", ("B", "read"), 1),
        ("option_function", "**The answer is: `read`**", ("B", "read"), 1),
        ("option_function", "Answer: option B", ("B", "read"), 0),
        ("option_function", "My answer: B", ("B", "read"), 1),
        ("option_function", "answer is B", ("B", "read"), 0),
        ("option_function", "It is: A, not B", ("B", "read"), 0),
        ("option_function", "The answer is: _set_option", ("B", "_set_option"), 0),
        ("name_word", "It is Ace Rothstein", ("ACE", "ACE ROTHSTEIN"), 1),
        ("name_word", "Aces", ("ACE",), 0),
        ("name_word", "{jim}!", ("JIM", "GARRISON"), 1),
        ("whole_word", 'The value is: "c14c-8a",', ("c14c-8a",), 1),
        ("whole_word", "c14c-8ab", ("c14c-8a",), 0),
        ("whole_word", "C14C-8A", ("c14c-8a",), 0),
        ("whole_word", "c14c-8a;", ("c14c-8a",), 0),
        ("contains", "c14c-8ab", ("c14c-8a",), 1),
        ("contains", "C14C-8A", ("c14c-8a",), 0),
        ("first_integer", "key 71432.", ("71432",), 1),
        ("first_integer", "-71432", ("71432",), 1),
        ("first_integer", "no 1: 71432", ("71432",), 0),
        ("first_integer", "71,432", ("71432",), 0),
        ("last_integer", "The value is `-14`.", ("-14",), 1),
        ("last_integer", "= 4", ("4",), 1),
        ("last_integer", "4 (four)", ("4",), 0),
        ("last_integer", "return: 4.", ("4",), 1),
        ("last_integer", "4.0", ("4",), 0),
        ("first_number", "88 or 9", ("88",), 1),
        ("first_number", "-88", ("88",), 1),
        ("first_number", "8.5", ("8.5",), 1),
        ("first_number", "8", ("8.0",), 1),
        ("first_number", "none", ("8",), 0),
        ("first_number_truncated", "88.7", ("88",), 1),
        ("first_number_truncated", "88.7", ("88.0",), 0),
        ("first_number_truncated", "88.7", ("88.7",), 1),
        ("first_number_truncated", "88", ("88",), 1),
        ("first_number_truncated", "x", ("88",), 0),
        ("leading_integers", "[79, 59, 73]", ("79", "59", "73", "78"), 0.75),
        ("leading_integers", "79 then 58", ("79", "59"), 0.5),
        ("leading_integers", "-79", ("79",), 1),
        ("leading_integers", "", ("79",), 0),
        ("token_f1", "On the island.", ("the hebrides", "an island"), 0.6666666666666666),
        ("token_f1", "A stocking", ("stockings",), 0),
        ("token_f1", "world-war 1", ("fighting in world war 1",), 0.28571428571428575),
        ("token_f1", "the", ("the",), 0),
        ("character_f1", "两个。", ("2", "两个", "二"), 1),
        ("character_f1", "《红楼梦》", ("红楼梦",), 0.8571428571428571),
        ("character_f1", "田归农、薛鹊", ("田归农, 薛鹊",), 1),
        ("character_f1", "A·B", ("ab",), 0.8),
        ("character_f1", "、。〃", ("。",), 0),
    ],
)
def test_infinitebench_and_scbench(
    metric: str, prediction: str, answers: tuple[str, ...], published: float
) -> None:
    assert score(metric, prediction, *answers) == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize(
    ("task", "prediction", "question", "target", "published"),
    [
        ("qa1", "Mary is in the Kitchen. Not the office.", "Where is Mary?", "kitchen", 1),
        ("qa1", "kitchen or office", "Where is Mary?", "kitchen", 0),
        (
            "qa2",
            "in the garden, after the office",
            "Where was the milk before the office?",
            "garden",
            1,
        ),
        ("qa5", "Fred gave the Milk", "What did Fred give?", "milk", 1),
        ("qa5", "Mary", "Who?", "Mary", 1),
        ("qa7", "three", "How many objects?", "three", 1),
        ("qa7", "none", "How many objects is Mary carrying?", "none", 0),
        ("qa8", "the apple and the milk", "What is Mary carrying?", "apple,milk", 1),
        ("qa8", "apple", "What is Mary carrying?", "apple,milk", 0),
        ("qa8", "milk, apple, football", "What is Mary carrying?", "milk,apple", 0),
        ("qa8", "nothing", "What is Mary carrying?", "nothing", 1),
        ("qa19", "s,e", "How do you go?", "s,e", 1),
        ("qa19", "s, e", "How do you go?", "s,e", 0),
        ("qa19", "n,e,s", "How?", "n,e", 0),
        ("qa6", "No.", "Is Mary there?", "no", 1),
        ("qa6", "I know.", "Is Mary there?", "no", 1),
        ("qa10", "maybe", "Is Bill in the school?", "maybe", 1),
        ("qa1", "Question: office", "Where?", "office", 1),
        ("qa1", "office<example>kitchen", "Where?", "office", 1),
        ("qa20", "bored", "Why did Yann go to the garden?", "bored", 1),
        ("qa15", "a mouse", "What is Gertrude afraid of?", "mouse", 1),
    ],
)
def test_babilong(task: str, prediction: str, question: str, target: str, published: float) -> None:
    query = f"Question: {question}"
    assert score("babilong", prediction, target, task=task, query=query) == published


def test_every_name_counts_and_names_of_several_words_do_too() -> None:
    """The authors' code looks at the first name alone, and never finds one of two words."""
    names = ("GAGGI", "Remo", "DAN RATHER")
    for right in ("It is Gaggi.", "remo", 'The name is "Dan Rather"', "DAN  RATHER!"):
        assert score("name_word", right, *names) == 1, right
    for wrong in ("Dan", "Rather Dan", "Dan, then Rather", "Remote", "", "Dan Rathers"):
        assert score("name_word", wrong, *names) == 0, wrong


def test_numbers_of_many_digits_are_wrong_answers_and_no_errors() -> None:
    """Python refuses to convert more than 4,300 digits."""
    many = "9" * 5000
    assert score("last_integer", many, "4") == 0
    assert score("leading_integers", f"4 {many}", "4", "2") == 0.5
    assert score("first_number", many, "4") == score("first_number_truncated", many, "4") == 0


@pytest.mark.parametrize(
    "answer", ["Snowfield", ["Snowfield"], ["Snowfield", "C"], "C", ["C"]], ids=repr
)
def test_a_choice_is_given_as_its_text_its_letter_or_both(answer: object) -> None:
    line = {
        "context": "c",
        "input": "Where?",
        "answer": answer,
        "options": ["Georgie", "Hall Farm", "Snowfield", "Mauras"],
    }
    sample = sample_of(line, task="longbook_choice_eng", id="x")
    assert sample.answers == ("C", "Snowfield")
    for wrong in (["Snowfield", "D"], ["Snowfield", "Georgie"], "E", ["Snow"]):
        with pytest.raises(InvalidInputError, match="is not one of its options"):
            sample_of({**line, "answer": wrong}, task="longbook_choice_eng", id="x")


def test_all_tasks_of_babilong_are_scored_but_only_five_have_our_prompts(tmp_path: Path) -> None:
    row = {"input": "Mary took the milk.", "question": "What has Mary?", "target": "milk"}
    path = write_lines(tmp_path / "qa8.jsonl", [row])
    with pytest.raises(InvalidInputError, match=r"qa8.* no prompt here.*--prompts"):
        read(path)
    parts = {"instruction": "Read.", "examples": "None.", "post_prompt": "Answer."}
    prompts = write_lines(tmp_path / "prompts.json", [{"qa8": parts}])
    (sample,) = read(path, prompts=str(prompts))
    assert metrics.score("The milk.", sample) == 1
    assert set(get("babilong").tasks) < set(LABELS)
    assert len(LABELS) == 20
    assert len(LABELS["qa19"]) == 12
