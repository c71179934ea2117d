"""BABILong (Kuratov et al., arXiv 2406.10149), tasks qa1 to qa5: facts of a short story scattered in a long text.

The stories are bAbI-style, made by our own simulation (`babi_world`), so they are not the published samples; those are read with
`sample_of_row`. The prompt has the published structure: instruction, worked examples, what the answer should look like, and the
text between `<context>` and `</context>`; then `Question: ...`. Its sentences are our own, so that scores come near published
ones without being the same measurement. Answers are compared as published.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals import suites
from star_attention.evals.babi_world import ACTORS, FACTS, OBJECTS, ROOMS, Story, story
from star_attention.evals.record import Sample
from star_attention.evals.sizing import Size
from star_attention.evals.sources import prose
from star_attention.hf.text import query_ids

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
OPTIONS = {"background": "the text that facts are scattered in: .json, a folder of .txt, or a text file"}
LABELS = {task: ROOMS for task in TASKS} | {"qa5": (*ACTORS["qa5"], *OBJECTS)}
"""All that can be an answer of a task, as published."""
MAX_NEW_TOKENS = 20
ASK = "Question: "
SHARE_OF_FACTS = 8
"""Facts take at most one token in so many of a sample's length."""

_READ = (
    "A few sentences about {} are hidden in a long text about other things. Use nothing but those sentences to answer."
)
_INSTRUCTION = {
    "qa1": _READ.format("where people go") + " A person is where they went last.",
    "qa2": _READ.format("people, where they go and what they carry")
    + " A thing is where its holder is, or where it was put down last.",
    "qa3": _READ.format("people, where they go and what they carry")
    + " A thing goes wherever its holder goes; you are asked in which room it was before it came to another.",
    "qa4": _READ.format("which room lies on which side of another"),
    "qa5": _READ.format("people, what they carry and what they give to each other"),
}
_EXAMPLES = {
    "qa1": (
        ("Mary went to the office. John moved to the garden. Mary moved to the kitchen.", "Where is Mary?", "kitchen"),
        ("Sandra journeyed to the hallway. Daniel went to the bedroom.", "Where is Sandra?", "hallway"),
    ),
    "qa2": (
        (
            "Daniel went to the office. Daniel took the milk. Daniel travelled to the garden.",
            "Where is the milk?",
            "garden",
        ),
        (
            "Mary moved to the bedroom. Mary grabbed the apple. Mary dropped the apple. Mary went to the kitchen.",
            "Where is the apple?",
            "bedroom",
        ),
    ),
    "qa3": (
        (
            "John went to the kitchen. John got the football. John moved to the office. John journeyed to the hallway.",
            "Where was the football before the hallway?",
            "office",
        ),
        (
            "Sandra moved to the bathroom. Sandra picked up the milk. Sandra went to the garden. Sandra left the milk.",
            "Where was the milk before the garden?",
            "bathroom",
        ),
    ),
    "qa4": (
        (
            "The office is north of the kitchen. The kitchen is east of the garden.",
            "What is north of the kitchen?",
            "office",
        ),
        (
            "The bedroom is west of the hallway. The bathroom is south of the hallway.",
            "What is the hallway east of?",
            "bedroom",
        ),
    ),
    "qa5": (
        (
            "Fred went to the office. Mary moved to the office. Fred took the milk. Fred gave the milk to Mary.",
            "Who did Fred give the milk to?",
            "Mary",
        ),
        (
            "Bill went to the garden. Jeff went to the garden. Jeff got the apple. Jeff handed the apple to Bill.",
            "What did Jeff give to Bill?",
            "apple",
        ),
    ),
}
_ANSWER = {
    "qa1": "Answer with the name of one room and nothing else.",
    "qa2": "Answer with the name of one room and nothing else.",
    "qa3": "Answer with the name of one room and nothing else.",
    "qa4": "Answer with the name of one room and nothing else.",
    "qa5": "Answer with the name of one person or one thing and nothing else.",
}


def generate(task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]) -> Iterator[Sample]:
    """Samples whose facts stand in order between the sentences of `background`, read from a random one on and again from its
    first where it is too short.

    Sentences of the background that name somebody of the stories are left out, so that the facts alone tell of them. A story has
    fewer facts than drawn where they would take more than an eighth of the length. meta: `facts`, their number; `evidence`, the
    facts themselves; the background's name and hash.

    Raises `SizeError` for a length that is too short, `InvalidInputError` for an unknown task or option and unusable background.
    """
    suites.check(suites.get("babilong"), "babilong", task, options)
    between = _background(options.get("background"))
    described = prose(options.get("background")).described
    return (
        _generated(task, size, f"{task} {size.length} {seed} {index}", between, described) for index in range(count)
    )


def _generated(task: str, size: Size, name: str, between: Sequence[str], described: Mapping[str, str]) -> Sample:
    told = _fitting_story(task, size, name)
    start = random.Random(f"babilong {name} start").randrange(len(between))

    def build(sentences: int) -> Sample:
        text = [between[(start + i) % len(between)] for i in range(sentences)]
        text = scattered(told.facts, text, random.Random(f"babilong {name} places"))
        return _sample(
            id=name.replace(" ", "-"),
            task=task,
            length=size.length,
            text=" ".join(text),
            question=told.question,
            target=told.answer,
            meta={"facts": len(told.facts), "evidence": list(told.facts), **described},
        )

    return size.largest(build, least=0)[1]


def _fitting_story(task: str, size: Size, name: str) -> Story:
    least, most = FACTS[task]
    room = size.length // SHARE_OF_FACTS
    for facts in range(random.Random(f"babilong {name}").randint(least, most), least - 1, -1):
        told = story(task, facts, random.Random(f"babilong {name} {facts}"))
        taken = len(query_ids(size.tokenizer, " ".join(told.facts)))
        if taken <= room:
            return told
    raise SizeError(
        f"length {size.length:,} is too short for {task}: its facts may take an eighth of it, {room} tokens, and take {taken};"
        f" give at least {taken * SHARE_OF_FACTS:,}"
    )


@functools.cache
def _background(path: str | None) -> tuple[str, ...]:
    people = re.compile(rf"\b({'|'.join(sorted({name for names in ACTORS.values() for name in names}))})\b")
    kept = tuple(sentence for sentence in prose(path).sentences if not people.search(sentence))
    if not kept:
        raise InvalidInputError(f"{path} has no sentence without the people of the stories; give another background")
    return kept


def scattered(parts: Sequence[str], between: Sequence[str], rng: random.Random) -> list[str]:
    """The parts in their order at random places between sentences, in front of the first and behind the last included."""
    places = sorted(int(rng.random() * (len(between) + 1)) for _ in parts)
    text: list[str] = []
    done = 0
    for part, place in zip(parts, places, strict=True):
        text += [*between[done:place], part]
        done = place
    return text + list(between[done:])


def sample_of_row(row: Mapping[str, Any], *, task: str, id: str) -> Sample:
    """Of a row of the published files (`input`, `question`, `target`), whose lengths are counted in other tokens: `length` is 0.

    Raises `InvalidInputError` for tasks other than qa1 to qa5, and for fields that are missing or no text.
    """
    if task not in TASKS:
        raise InvalidInputError(f"task {task!r} of BABILong has no prompt here; choose from {', '.join(TASKS)}")
    for field in ("input", "question", "target"):
        if not isinstance(row.get(field), str):
            raise InvalidInputError(f"{field} {row.get(field)!r} of BABILong is no text")
    return _sample(
        id=id, task=task, length=0, text=row["input"], question=row["question"], target=row["target"], meta={}
    )


def _sample(
    *, id: str, task: str, length: int, text: str, question: str, target: str, meta: Mapping[str, Any]
) -> Sample:
    before, after = frame(task)
    return Sample(
        id=id,
        task=task,
        length=length,
        context=f"{before}{text}{after}",
        query=f"{ASK}{question}",
        answer_prefix="",
        answers=(target,),
        max_new_tokens=MAX_NEW_TOKENS,
        metric="babilong",
        meta=meta,
    )


def frame(task: str) -> tuple[str, str]:
    """What stands before a task's text in the context, and behind it."""
    examples = "\n\n".join(
        f"<example>\n{facts}\n{ASK}{asked}\nAnswer: {answer}\n</example>" for facts, asked, answer in _EXAMPLES[task]
    )
    return f"{_INSTRUCTION[task]}\n\n{examples}\n\n{_ANSWER[task]}\n\n<context>\n", "\n</context>\n\n"


def answer_match(prediction: str, sample: Sample) -> float:
    """BABILong's: whether the labels of the task in the prediction's first sentence, less those in the question, are the target,
    or all of its parts where it has commas.

    Raises `InvalidInputError` for a task whose labels are not known.
    """
    if sample.task not in LABELS:
        raise InvalidInputError(
            f"metric babilong of sample {sample.id} knows no labels of task {sample.task!r}; it takes {', '.join(LABELS)}"
        )
    given = re.split(r"\.|<context>|<example>", prediction.lower(), maxsplit=1)[0]
    question = sample.query.lower()
    labels = [label.lower() for label in LABELS[sample.task]]
    found = {label for label in labels if label in given and label not in question}
    return float(any(found == {part.strip() for part in answer.lower().split(",")} for answer in sample.answers))
