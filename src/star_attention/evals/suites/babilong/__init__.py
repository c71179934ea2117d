"""BABILong (Kuratov et al., arXiv 2406.10149), tasks qa1 to qa5: facts of a short story scattered in a long text.

The stories are bAbI-style, made by our own simulation (`babi_world`), so they are not the published samples; those are read with
`sample_of_row`. The prompt is instruction, worked examples, what the answer should look like, and the text between `<context>` and
`</context>`; then `Question: ...`. Without the published file of `prompts` its sentences are our own, which the bundled model was
trained on: scores come near published ones without being the same measurement. Answers are compared as published.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals import suites
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import prose
from star_attention.evals.suites.babilong.prompts import Frame, frame
from star_attention.evals.suites.babilong.world import ACTORS, FACTS, OBJECTS, ROOMS, Story, story
from star_attention.hf.text.tokens import query_ids

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
OPTIONS = {
    "background": "the text that facts are scattered in: .json, a folder of .txt, or a text file",
    "prompts": "BABILong's published prompts.py, or .json of its DEFAULT_PROMPTS; else prompts of our own",
}
LABELS = {task: ROOMS for task in TASKS} | {"qa5": (*ACTORS["qa5"], *OBJECTS)}
"""All that can be an answer of a task, as published."""
MAX_NEW_TOKENS = 20
SHARE_OF_FACTS = 8
"""Facts take at most one token in so many of a sample's length."""


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """Samples whose facts stand in order between the sentences of `background`, read from a random one on and again from its
    first where it is too short.

    Sentences of the background that name somebody of the stories are left out, so that the facts alone tell of them. A story has
    fewer facts than drawn where they would take more than an eighth of the length. meta: `facts`, their number; `evidence`, the
    facts themselves; the background's name and hash; that of published prompts.

    Raises `SizeError` for a length that is too short, `InvalidInputError` for an unknown task or option and unusable background.
    """
    suites.check(suites.get("babilong"), "babilong", task, options)
    between = _background(options.get("background"))
    described = prose(options.get("background")).described
    around = frame(task, options.get("prompts"))
    return (
        _generated(task, size, f"{task} {size.length} {seed} {index}", between, around, described)
        for index in range(count)
    )


def _generated(
    task: str,
    size: Size,
    name: str,
    between: Sequence[str],
    around: Frame,
    described: Mapping[str, str],
) -> Sample:
    told = _fitting_story(task, size, name)
    start = random.Random(f"babilong {name} start").randrange(len(between))

    def build(sentences: int) -> Sample:
        text = [between[(start + i) % len(between)] for i in range(sentences)]
        text = scattered(told.facts, text, random.Random(f"babilong {name} places"))
        return _sample(
            id=name.replace(" ", "-"),
            task=task,
            length=size.length,
            around=around,
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
    people = re.compile(
        rf"\b({'|'.join(sorted({name for names in ACTORS.values() for name in names}))})\b"
    )
    kept = tuple(sentence for sentence in prose(path).sentences if not people.search(sentence))
    if not kept:
        raise InvalidInputError(
            f"{path} has no sentence without the people of the stories; give another background"
        )
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


def sample_of_row(
    row: Mapping[str, Any], *, task: str, id: str, prompts: str | None = None
) -> Sample:
    """Of a row of the published files (`input`, `question`, `target`), whose lengths are counted in other tokens: `length` is 0.

    prompts: path of the published ones, as in `OPTIONS`.

    Raises `InvalidInputError` for tasks other than qa1 to qa5, for fields that are missing or no text, and for unusable prompts.
    """
    if task not in TASKS:
        raise InvalidInputError(
            f"task {task!r} of BABILong has no prompt here; choose from {', '.join(TASKS)}"
        )
    for field in ("input", "question", "target"):
        if not isinstance(row.get(field), str):
            raise InvalidInputError(f"{field} {row.get(field)!r} of BABILong is no text")
    return _sample(
        id=id,
        task=task,
        length=0,
        around=frame(task, prompts),
        text=row["input"],
        question=row["question"],
        target=row["target"],
        meta={},
    )


def _sample(
    *,
    id: str,
    task: str,
    length: int,
    around: Frame,
    text: str,
    question: str,
    target: str,
    meta: Mapping[str, Any],
) -> Sample:
    return Sample(
        id=id,
        task=task,
        length=length,
        context=f"{around.before}{text}{around.after}",
        query=f"{around.ask}{question}".rstrip(),  # (published questions end in a space, and published prompts do not)
        answer_prefix="",
        answers=(target,),
        max_new_tokens=MAX_NEW_TOKENS,
        metric="babilong",
        meta=dict(meta) | ({"prompts_sha256": around.sha256} if around.sha256 else {}),
    )


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
    return float(
        any(
            found == {part.strip() for part in answer.lower().split(",")}
            for answer in sample.answers
        )
    )
