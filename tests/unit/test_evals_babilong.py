"""BABILong: stories against a checker that knows only their text, samples, published rows."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.formats.babilong import sample_of
from star_attention.evals.metrics import score
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from star_attention.evals.suites.babilong.prompts import EXAMPLES
from star_attention.evals.suites.babilong.stories import FACTS, LABELS, ROOMS, Story, story
from star_attention.hf.text.tokens import query_ids
from tests.babilong import DROP, TAKE, answers
from tests.engines import bundled_tokenizer

SUITE = get("babilong")
LENGTHS = (900, 2048)


def size(length: int) -> Size:
    return Size(tokenizer=bundled_tokenizer(), length=length)


def generate(
    task: str, length: int = 900, count: int = 4, seed: int = 0, **options: str
) -> list[Sample]:
    return list(SUITE.generate(task, size=size(length), count=count, seed=seed, options=options))


# ------------------------------------------------------------------ stories


def stories(task: str, count: int = 150) -> list[Story]:
    rng = random.Random(f"stories {task}")
    return [story(task, rng.randint(*FACTS[task]), rng) for _ in range(count)]


@pytest.mark.parametrize("task", SUITE.tasks)
def test_a_story_has_one_answer_that_follows_from_its_text(task: str) -> None:
    for tale in stories(task):
        assert answers(" ".join(tale.facts), tale.question) == {tale.answer}, tale
        assert tale.answer in LABELS[task]


@pytest.mark.parametrize("task", SUITE.tasks)
def test_worked_examples_are_right(task: str) -> None:
    for text, question, answer in EXAMPLES[task]:
        assert answers(text, question) == {answer}


def test_stories_ask_every_kind_of_question_and_have_every_answer() -> None:
    for task in SUITE.tasks:
        assert {tale.answer for tale in stories(task, 400)} == set(LABELS[task]), task
    shapes = {
        re.sub(r"Bill|Fred|Jeff|Mary|apple|football|milk", "_", tale.question)
        for tale in stories("qa5")
    }
    assert len(shapes) == 5
    ends = {tale.question.endswith("of?") for tale in stories("qa4")}
    assert ends == {True, False}


def test_things_are_dropped_and_carried_on() -> None:
    texts = [" ".join(tale.facts) for tale in stories("qa2")]
    assert any(DROP.search(text) for text in texts)
    assert any(len(TAKE.findall(text)) > 3 for text in texts), "nothing is taken again"


# ------------------------------------------------------------------ samples


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", SUITE.tasks)
def test_samples_fill_their_length_and_have_their_story_in_the_context(
    task: str, length: int
) -> None:
    for sample in generate(task, length):
        assert length - 120 < size(length).tokens(sample) <= length
        text = sample.context.rpartition("<context>\n")[2].removesuffix("\n</context>\n\n")
        question = sample.query.removeprefix("Question: ")
        assert answers(text, question) == set(sample.answers)
        assert [fact for fact in sample.meta["evidence"] if fact in text] == sample.meta["evidence"]
        assert len(query_ids(bundled_tokenizer(), " ".join(sample.meta["evidence"]))) <= length / 8
        assert sample.answers[0].lower() not in sample.query.lower()
        assert sample.meta["prose"] == "pydoc_data.topics"


def test_facts_are_scattered_over_the_whole_text() -> None:
    depths = []
    for sample in generate("qa1", 2048, count=20):
        text = sample.context.rpartition("<context>\n")[2]
        depths += [text.index(fact) / len(text) for fact in sample.meta["evidence"]]
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert 0.3 < sum(depths) / len(depths) < 0.7


@pytest.mark.parametrize("task", SUITE.tasks)
def test_a_sample_does_not_depend_on_how_many_are_generated(task: str) -> None:
    assert generate(task, count=3) == generate(task, count=5)[:3]
    assert generate(task)[0].context != generate(task, seed=1)[0].context
    assert (
        len(
            {
                sample.id
                for sample in [*generate(task), *generate(task, seed=1), *generate(task, 901)]
            }
        )
        == 12
    )


@pytest.mark.parametrize("task", SUITE.tasks)
def test_the_answer_scores_1_and_nothing_else_does(task: str) -> None:
    for sample in generate(task):
        assert score(f"\nAnswer: {sample.answers[0]}.", sample) == 1.0
        for wrong in {"", *LABELS[task]} - set(sample.answers):
            assert score(wrong, sample) == 0.0


def test_a_short_background_is_repeated_without_the_people_of_the_stories(
    tmp_path: Path,
) -> None:
    text = tmp_path / "book.txt"
    text.write_text(
        "It rained all day. Mary went to the office. The Marys of this world like rain."
    )
    for sample in generate("qa1", background=str(text)):
        assert sample.context.count("It rained all day.") > 20
        assert sample.context.count("The Marys of this world like rain.") > 20
        question = sample.query.removeprefix("Question: ")
        assert answers(sample.context.rpartition("<context>")[2], question) == set(sample.answers)
        assert sample.meta["prose"] == "book.txt"
    text = tmp_path / "play.txt"
    text.write_text("Mary went to the office.")
    with pytest.raises(InvalidInputError, match="no sentence without the people"):
        generate("qa1", background=str(text))


def test_short_lengths_unknown_tasks_and_options_are_refused() -> None:
    with pytest.raises(
        SizeError,
        match=r"length 100 is too short for qa3: its facts take \d+ tokens, and may take an",
    ):
        generate("qa3", 100)
    with pytest.raises(SizeError, match="length 250 is too short for a sample of qa4"):
        generate("qa4", 250)
    with pytest.raises(InvalidInputError, match="task 'qa6' of babilong is unknown"):
        generate("qa6")
    with pytest.raises(InvalidInputError, match="option 'essays' of babilong is unknown"):
        generate("qa1", essays="x")


# ------------------------------------------------------------------ published rows and their score

ROW = {
    "input": "Mary moved to the office. It rained.",
    "question": "Where is Mary? ",
    "target": "office",
}


def test_a_published_row_becomes_the_same_prompt() -> None:
    sample = sample_of(ROW, task="qa1", id="qa1-0")
    assert sample.context.endswith(
        "\n\n<context>\nMary moved to the office. It rained.\n</context>\n\n"
    )
    assert sample.context.split("<context>")[0] == generate("qa1")[0].context.split("<context>")[0]
    assert (sample.query, sample.answers, sample.length) == (
        "Question: Where is Mary?",
        ("office",),
        0,
    )
    with pytest.raises(InvalidInputError, match="task 'qa6' of BABILong"):
        sample_of(ROW, task="qa6", id="x")
    with pytest.raises(InvalidInputError, match="expected target to be a string, got None"):
        sample_of({**ROW, "target": None}, task="qa1", id="x")


PUBLISHED = """
import os

os.abort()
DEFAULT_TEMPLATE = '{instruction}\\n{examples}\\n{post_prompt}\\n' \\
    '<context>\\n{context}\\n</context>\\nAsked: {question}'
DEFAULT_PROMPTS = {
    'qa1': {
        'instruction': 'Where {people} '
            'go.',
        'examples': '<example>x</example>',
        'post_prompt': 'One word. '
    },
}
"""


def test_published_prompts_are_read_from_their_file(tmp_path: Path) -> None:
    """The template is filled as its authors do; the code next to it is not executed."""
    path = tmp_path / "prompts.py"
    path.write_text(PUBLISHED)
    sample = sample_of(ROW, task="qa1", id="x", prompts=str(path))
    assert sample.context == (
        "Where {people} go.\n<example>x</example>\nOne word. \n<context>\nMary moved to the office."
        " It rained.\n</context>\n"
    )
    assert sample.query == "Asked: Where is Mary?"
    assert len(sample.meta["prompts_sha256"]) == 16
    generated = generate("qa1", prompts=str(path))[0]
    assert generated.context.startswith("Where {people} go.\n<example>")
    assert generated.query.startswith("Asked: Where is ")
    with pytest.raises(InvalidInputError, match=r"prompts\.py has no prompt for qa2; it has qa1"):
        sample_of(ROW, task="qa2", id="x", prompts=str(path))
    prompts = path.with_suffix(".json")
    prompts.write_text('{"qa1": {"instruction": "i", "examples": "e", "post_prompt": "p"}}')
    sample = sample_of(ROW, task="qa1", id="x", prompts=str(prompts))
    assert sample.context.startswith("i\n\ne\n\np\n\n<context>\nMary")
    assert sample.query == "Question: Where is Mary?"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.py",
            "x = 1",
            r"a\.py has no DEFAULT_PROMPTS; give babilong/prompts\.py of github\.com/booydar/",
        ),
        ("b.py", "x = (", r"b\.py cannot be read as prompts \(.*; give"),
        ("c.json", "{", r"c\.json cannot be read as prompts"),
        (
            "d.py",
            "DEFAULT_PROMPTS = {'qa1': {'examples': 3}}",
            r"the prompt of qa1 does not consist of strings instruction, ",
        ),
        (
            "e.py",
            PUBLISHED.replace("\\nAsked", " Asked").replace("{context}\\n", "{context}"),
            r"does not have the question on a line below the context",
        ),
    ],
)
def test_other_files_than_prompts_are_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        sample_of(ROW, task="qa1", id="x", prompts=str(path))


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("office", True),
        ("The OFFICE", True),
        (" Mary is in the office. Before, she was in the kitchen.", True),
        ("office<context> kitchen", True),
        ("office<example> kitchen", True),
        ("office or kitchen", False),
        ("kitchen", False),
        (". office", False),
        ("", False),
    ],
)
def test_the_published_comparison(prediction: str, right: bool) -> None:
    sample = sample_of(ROW, task="qa1", id="x")
    assert score(prediction, sample) == right


def test_labels_of_the_question_do_not_count() -> None:
    row = {"input": "", "question": "What is north of the kitchen?", "target": "office"}
    sample = sample_of(row, task="qa4", id="x")
    assert score("The office is north of the kitchen.", sample) == 1.0
    assert score("kitchen", sample) == 0.0


def test_targets_with_commas_are_sets() -> None:
    sample = replace(sample_of(ROW, task="qa1", id="x"), answers=("office,kitchen",))
    assert score("kitchen and office", sample) == 1.0
    assert score("kitchen", sample) == 0.0
    assert score("kitchen, office, garden", sample) == 0.0


def test_a_task_without_labels_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="has no labels for task 'qa21'"):
        score("yes", replace(sample_of(ROW, task="qa1", id="x"), task="qa21"))


def test_the_labels_are_the_published_ones() -> None:
    assert set(ROOMS) == {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    assert set(LABELS["qa5"]) == {
        "Bill",
        "Fred",
        "Jeff",
        "Mary",
        "apple",
        "football",
        "milk",
    }
