"""BABILong: stories against a checker that knows only their text, samples, published rows."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import pairwise
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
from tests.engines import bundled_tokenizer

SUITE = get("babilong")
LENGTHS = (900, 2048)


def size(length: int) -> Size:
    return Size(tokenizer=bundled_tokenizer(), length=length)


def generate(
    task: str, length: int = 900, count: int = 4, seed: int = 0, **options: str
) -> list[Sample]:
    return list(SUITE.generate(task, size=size(length), count=count, seed=seed, options=options))


# ------------------------------------------------------------------ a reader of stories

MOVE = re.compile(r"\b(\w+) (?:moved|went|journeyed|travelled) to the (\w+)\.")
TAKE = re.compile(r"\b(\w+) (?:took|grabbed|picked up|got) the (\w+)\.")
DROP = re.compile(r"\b(\w+) (?:dropped|discarded|put down|left) the (\w+)\.")
GIVE = re.compile(r"\b(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
LIES = re.compile(r"\bThe (\w+) is (north|south|east|west) of the (\w+)\.")


def answers(text: str, question: str) -> set[str]:
    """All answers to a question that a text of facts, and of anything between them, gives."""
    events = sorted(
        (match.start(), kind, match.groups())
        for kind, pattern in {"move": MOVE, "take": TAKE, "drop": DROP, "give": GIVE}.items()
        for match in pattern.finditer(text)
    )
    room_of: dict[str, str] = {}
    holder_of: dict[str, str] = {}
    left_in: dict[str, str] = {}
    history: dict[str, list[str]] = {}
    gifts = []

    def place(thing: str) -> str | None:
        return room_of.get(holder_of[thing]) if thing in holder_of else left_in.get(thing)

    # The object is a room for moves, and a thing for all other events.
    for _, kind, (actor, object, *receiver) in events:
        if kind == "move":
            assert room_of.get(actor) != object, "moved to where they were"
            room_of[actor] = object
        elif kind == "take":
            assert object not in holder_of, "taken from somebody's hands"
            assert left_in.get(object, room_of[actor]) == room_of[actor], (
                "taken in another room than it was left in"
            )
            holder_of[object] = actor
        elif kind == "drop":
            assert holder_of.pop(object) == actor
            left_in[object] = room_of[actor]
        else:
            assert holder_of[object] == actor
            assert room_of[actor] == room_of[receiver[0]]
            holder_of[object] = receiver[0]
            gifts.append((actor, object, receiver[0]))
        for thing in {*holder_of, *left_in}:
            rooms = history.setdefault(thing, [])
            if rooms[-1:] != [place(thing)]:
                rooms.append(str(place(thing)))

    if match := re.fullmatch(r"Where is (?:the )?(\w+)\?", question):
        name = match[1]
        return {str(place(name) if name in {*holder_of, *left_in} else room_of[name])}
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        rooms = ["nowhere known", *history[match[1]]]
        return {before for before, room in pairwise(rooms) if room == match[2]}
    if " of" in question:
        return directions(text, question)
    return gift_answers(gifts, question)


def directions(text: str, question: str) -> set[str]:
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    lies = {(a, side, b) for a, side, b in LIES.findall(text)}
    lies |= {(b, back[side], a) for a, side, b in lies}
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        return {a for a, side, b in lies if (side, b) == match.groups()}
    match = re.fullmatch(r"What is the (\w+) (\w+) of\?", question)
    assert match, question
    return {b for a, side, b in lies if (a, side) == match.groups()}


def gift_answers(gifts: list[tuple[str, str, str]], question: str) -> set[str]:
    if match := re.fullmatch(r"What did (\w+) give to (\w+)\?", question):
        return {thing for giver, thing, receiver in gifts if (giver, receiver) == match.groups()}
    if match := re.fullmatch(r"Who gave the (\w+) to (\w+)\?", question):
        return {giver for giver, thing, receiver in gifts if (thing, receiver) == match.groups()}
    if match := re.fullmatch(r"Who did (\w+) give the (\w+) to\?", question):
        return {receiver for giver, thing, receiver in gifts if (giver, thing) == match.groups()}
    if match := re.fullmatch(r"Who gave the (\w+)\?", question):
        return {giver for giver, thing, _ in gifts if thing == match[1]}
    match = re.fullmatch(r"Who received the (\w+)\?", question)
    assert match, question
    return {receiver for _, thing, receiver in gifts if thing == match[1]}


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
def test_a_sample_is_the_same_whatever_is_made_with_it(task: str) -> None:
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
    with pytest.raises(InvalidInputError, match="has no labels for task 'qa9'"):
        score("yes", replace(sample_of(ROW, task="qa1", id="x"), task="qa9"))


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
