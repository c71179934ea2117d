"""Documents of BABILong's stories."""

from __future__ import annotations

import dataclasses
import math
import random

from star_attention.evals.samples.building import scatter
from star_attention.evals.suites.babilong import stories
from star_attention.evals.suites.babilong.prompts import QUESTION_LEAD, read_frame
from training.documents import Document, Maker, Question

_SHARES = {"qa1": 1, "qa2": 3, "qa3": 4, "qa4": 1, "qa5": 1}
"""Relative shares of the stories of each task."""


def story_document(maker: Maker, room: int) -> Document:
    """Tell a story and ask everything that it settles, including questions of easier tasks.

    Half of the stories continue after the questions, with a few facts and questions at a time: what
    changes from one fact to the next is what has to be learned.
    """
    rng = maker.rng
    task = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    least, most = stories.FACTS[task]
    facts = rng.randint(least, max(least, min(most, room // 60)))
    continues = task != "qa4" and rng.random() < 0.5
    first, *others = stories.chapters(
        task, [facts, *(rng.randint(1, 4) for _ in range(24 * continues))], rng
    )
    frame = read_frame(task)
    questions = _questions(first, task, maker.num_questions(room, 30), rng)
    rest = (
        room
        - maker.size(frame.before + frame.after + " ".join(first.facts))
        - maker.size_of(questions)
    )
    room_for_others = rng.random() * rest
    for chapter in others:
        more = _questions(chapter, task, rng.randint(1, 3), rng)
        text = f"{' '.join(chapter.facts)}\n{more[0].text}"
        more[0] = dataclasses.replace(more[0], text=text)
        taken = maker.size_of(more)
        if taken > room_for_others:
            break
        rest, room_for_others = rest - taken, room_for_others - taken
        questions += more
    filler = maker.fill(maker.prose(), max(0, rest - 8), " ")
    text = " ".join(scatter(first.facts, filler, rng))
    return Document(context=f"{frame.before}{text}{frame.after}", questions=questions)


def _questions(
    chapter: stories.Chapter, task: str, count: int, rng: random.Random
) -> list[Question]:
    """Draw questions, two in three of them (if there are as many) of the task itself."""
    by_task = {
        name: [(name, *pair) for kind in kinds for pair in kind]
        for name, kinds in chapter.questions.items()
    }
    own = by_task.pop(task)
    others = [pair for pairs in by_task.values() for pair in pairs]
    chosen = rng.sample(own, min(len(own), math.ceil(count * 2 / 3)))
    chosen += rng.sample(others, min(len(others), count - len(chosen)))
    rng.shuffle(chosen)
    return [
        Question(task=name, text=f"{QUESTION_LEAD}{question}", answer=f" {answer}")
        for name, question, answer in chosen
    ]
