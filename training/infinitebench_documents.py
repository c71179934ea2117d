"""Documents of InfiniteBench's tasks."""

from __future__ import annotations

import math
import random

from star_attention.evals.suites.infinitebench.generate import sample_of_units
from star_attention.evals.suites.shared.generate import key_values
from training.documents import Document, Maker, Question

_PAIR_TOKENS = 75
"""Tokens of a key and its value, about."""
_QUESTION_TOKENS = 80
"""Tokens of a question for a value and its answer, about."""


def search_document(maker: Maker, room: int) -> Document:
    """Hide a pass key, a string of digits, or the largest and smallest numbers of a list."""
    rng = maker.rng
    task = rng.choice(("passkey", "number_string", "math_find"))
    seed = rng.random()

    def build(units: int) -> tuple[int, Document]:
        sample = sample_of_units(task, units, random.Random(seed), id="", length=0)
        question = Question(
            task=task, text=sample.query + sample.answer_prefix, answer=f" {sample.answers[0]}"
        )
        document = Document(context=sample.context, questions=[question])
        return maker.size(document.context) + maker.size_of(document.questions), document

    empty, document = build(0)
    unit_size = (build(50)[0] - empty) / 50
    units = int((room - empty) / unit_size)
    while units > 0:
        taken, document = build(units)
        if taken <= room:
            break
        units -= math.ceil((taken - room) / unit_size)
    return document


def pair_document(maker: Maker, room: int) -> Document:
    """List keys and values, and ask for several values."""
    count = max(1, min(12, maker.num_questions(room, 300)))
    pairs = max(count, (room - 40 - count * _QUESTION_TOKENS) // _PAIR_TOKENS)
    context, questions = key_values(pairs, count, maker.rng)
    return Document(
        context=context,
        questions=[
            Question(
                task="kv_retrieval",
                text=question.query + question.prefix,
                answer=f" {question.answer}",
            )
            for question in questions
        ],
    )
